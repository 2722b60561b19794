"""Code of the user's own that files name, as "package.module.Class". It is imported only if its package is trusted."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dgnet.errors import UsageError, reason

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
    package = path.partition(".")[0]
    if not any(path == name or path.startswith(f"{name}.") for name in _trusted.get()):
        raise UsageError(
            f"{what} is code of the package {package} ({path}), which is run only if you trust it: --trust-code {package},"
            f" or in Python trust_code={package!r}"
        )
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        line = f"{what}: {module} cannot be imported ({reason(error)}); install it, or add its folder to PYTHONPATH"
        raise UsageError(line) from None
    except AttributeError:
        raise UsageError(f"{what}: {module} has no {name}; install the version that the network was trained with") from None
