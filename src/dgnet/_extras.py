"""Packages that only some commands need; an extra of dgnet installs them, as in `pip install 'dgnet[explore]'`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from dgnet.errors import UsageError, reason

EXTRAS = {
    "detect": ("pycocotools",),
    "experiments": ("scipy",),
    "explore": ("gradio",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "hfds": ("datasets",),
}
"""Extra -> the packages that it installs, as they are imported. pyproject.toml says which versions."""


def import_extra(module: str, what: str) -> Any:
    """Import a module of a package that may be missing. `what` needs it, such as "dgnet explore".

    Raises UsageError, with the command that installs it, if it is missing or cannot be imported.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        problem = "is not installed" if is_missing else f"cannot be imported ({reason(error)})"
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        wanted = package.replace("_", "-") if extra is None else f"'dgnet[{extra}]'"
        raise UsageError(f"{what} needs {package}, which {problem}; type: pip install {wanted}") from None


def find_missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
