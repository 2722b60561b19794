"""Code of the user's own that files name, as "package.module.Class". It is imported only if its package is trusted.

Trusted is what the user has typed (`--import`, `--trust-code`, a class as the value of an option), and what the variable
DGNET_TRUST_CODE lists. A recipe, a run folder and a published network cannot make code trusted, wherever they come from.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dgnet.errors import UsageError, reason

TRUSTED = "DGNET_TRUST_CODE"
"""The environment variable with the packages that the user trusts in every command, separated by commas."""

CODE_OPTIONS = ("topology", "weighting", "router", "router_pool")
"""Options of a network that may be code of the user's own."""

_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


@contextmanager
def trust_code(modules: str | Iterable[str]) -> Iterator[None]:
    """Inside the `with` block, code of these modules and packages may be imported where a file names it."""
    token = _trusted.set((*_trusted.get(), *([modules] if isinstance(modules, str) else modules)))
    try:
        yield
    finally:
        _trusted.reset(token)


def is_code_path(value: object) -> bool:
    """Whether an option's value names code: "package.module.Class"."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))


def code_path(code: Any) -> str | None:
    """The import path of a class or function; None if it has none: a lambda, an object, what is defined in `__main__`."""
    module, name = getattr(code, "__module__", None), getattr(code, "__qualname__", "<none>")
    path = f"{module}.{name}"
    return path if module not in (None, "__main__") and is_code_path(path) else None


def find_code(path: str, what: str) -> Any:
    """The class or function at the import path `path`, which the option `what` names.

    Raises UsageError if its module is not trusted, cannot be imported, or does not have it.
    """
    _check_trust(path, what)
    module, _, name = path.rpartition(".")
    try:
        return getattr(_import(module, what), name)
    except AttributeError:
        raise UsageError(f"{what}: {module} has no {name}; install the version that the network was trained with") from None


def list_packages(text: str | None, what: str) -> list[str]:
    """The packages that an option lists, separated by commas. Raises UsageError for one that cannot be a name."""
    names = [name.strip() for name in (text or "").split(",")] if text else []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"{what} takes packages as they are imported, separated by commas, got {name!r}")
    return list(dict.fromkeys(names))


def import_packages(names: Iterable[str], what: str) -> None:
    """Import packages, for what they register. Raises UsageError for one that is not trusted or cannot be imported."""
    for name in names:
        _check_trust(name, what)
        _import(name, what)


def _check_trust(path: str, what: str) -> None:
    """Raises UsageError if the module or class at `path`, which `what` names, is not of a trusted package."""
    trusted = (*_trusted.get(), *list_packages(os.environ.get(TRUSTED), TRUSTED))
    if any(path == name or path.startswith(f"{name}.") for name in trusted):
        return
    package = path.partition(".")[0]
    where = "" if path == package else f" ({path})"
    raise UsageError(
        f"{what} is code of the package {package}{where}, which is run only if you trust it: --trust-code {package}, or in"
        f" Python trust_code={package!r}"
    )


def _import(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        line = f"{what}: {module} cannot be imported ({reason(error)}); install it, or add its folder to PYTHONPATH"
        raise UsageError(line) from None
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"{what}: {module} cannot be imported ({describe_error(error)}); correct it") from error


def describe_error(error: Exception) -> str:
    """An error in the user's own code: its class, its message, and the line that raised it."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}, {error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__ or sys.exc_info()[2])
    own = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    where = f", {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {reason(error)}{where}"
