"""Code of the user's own that files name, as "package.module.Class". It is imported only if its package is trusted.

Trusted is what the user has typed (`--import`, `--trust-code`, a class as the value of an option), and what the variable
DGNET_TRUST_CODE lists. A recipe, a run folder and a published network cannot make code trusted, wherever they come from.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any

from dgnet.errors import UsageError, reason, shorten

TRUSTED = "DGNET_TRUST_CODE"
"""The environment variable with the packages that the user trusts in every command, separated by commas."""

CODE_OPTIONS = ("topology", "weighting", "router", "router_pool")
"""Options of a network that may be code of the user's own."""

_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


@contextmanager
def trust_code(modules: str | Iterable[str]) -> Iterator[None]:
    """Inside the `with` block, code of these modules and packages may be imported where a file names it.

    Raises UsageError unless `modules` is a name or several names.
    """
    names = [modules] if isinstance(modules, str) else list(modules) if isinstance(modules, Iterable) else [modules]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"trust_code is the name of a package, or a list of names, got {modules!r}")
    token = _trusted.set((*_trusted.get(), *(name.strip() for name in names)))
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
    """The class or function at the import path `path`, which the option `what` names. It may be inside a class.

    What its module prints when it is imported goes to stderr: stdout may be a document.

    Raises UsageError if its module is not trusted, cannot be imported, or does not have it.
    """
    _check_trust(path, what)
    *names, name = path.split(".")
    module = ".".join(names)
    holder = _find_holder(names, what)
    if holder is None:
        raise _missing(module, what)
    try:
        return getattr(holder, name)
    except AttributeError:
        raise UsageError(f"{what}: {module} has no {name}; install the version that the network was trained with") from None


def list_packages(text: str | None, what: str) -> list[str]:
    """The packages that an option lists, separated by commas. Raises UsageError for one that cannot be a name."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"{what} takes packages as they are imported, separated by commas, got {shorten(name, 60)!r}")
    return list(dict.fromkeys(names))


def import_packages(names: Iterable[str], what: str) -> None:
    """Import packages, for what they register. Raises UsageError for one that is not trusted or cannot be imported."""
    for name in names:
        _check_trust(name, what)
        with redirect_stdout(sys.stderr):
            if _import(name, what) is None:
                raise _missing(name, what)


def _check_trust(path: str, what: str) -> None:
    """Raises UsageError if the module or class at `path`, which `what` names, is not of a trusted package."""
    trusted = (*_trusted.get(), *list_packages(os.environ.get(TRUSTED), TRUSTED))
    if any(path == name or path.startswith(f"{name}.") for name in trusted):
        return
    package = path.partition(".")[0]
    where = "" if path == package else f" ({path})"
    raise UsageError(
        f"{what} is code of the package {package}{where}, which is run only if you trust it: trust_code={package!r}"
    )


def _missing(module: str, what: str) -> UsageError:
    return UsageError(
        f"{what}: {module} cannot be imported: there is no such module; install it, or add its folder to PYTHONPATH"
    )


def _find_holder(names: Sequence[str], what: str) -> Any:
    """The module `names`, joined by dots, or the class in a module; None if there is neither."""
    with redirect_stdout(sys.stderr):
        found = _import(".".join(names), what)
    if found is not None or len(names) == 1:
        return found
    outer = _find_holder(names[:-1], what)
    return getattr(outer, names[-1], None)


def _import(module: str, what: str) -> Any:
    """The module; None if there is none of this name. Raises UsageError for any other error of its import."""
    try:
        return importlib.import_module(module)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # the module may raise anything, or end the process
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            return None
        why = f"it calls exit({error.code})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {reason(error)}"
        raise UsageError(f"{what}: {module} cannot be imported ({why}); repair it, or install what it needs") from None
