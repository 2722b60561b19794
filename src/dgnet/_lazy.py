"""Import the public names of a package when they are first used."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for a package whose `__init__.py` imports its names under `if TYPE_CHECKING`.

    Type checkers read these imports. This function reads them too; each is carried out when its name is first used. A name that
    is imported from the package itself is a submodule. `__all__` does not contain submodules.
    """
    modules = _read_imports(package)

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if modules[name] == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)  # the next use does not call this function
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, list_names, [name for name, module in modules.items() if module != package]


def _read_imports(package: str) -> dict[str, str]:
    """Name -> the module from which the package imports it under `if TYPE_CHECKING`."""
    source = pkgutil.get_data(package, "__init__.py")
    assert source is not None
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
    return {name.name: str(line.module) for line in imports for name in line.names}
