"""Code of the user's own on the two axes: what a class or function must be and take, checked before it is used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dgnet.code import code_path
from dgnet.errors import UsageError, shorten
from dgnet.graph import Weighting

_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "topology": ("num_nodes",),
    "weighting": ("topology", "channels"),
    "router": ("channels", "num_edges"),
    "router_pool": ("feature",),
}
"""Option -> what its class or function is called with."""

_BASES: Mapping[str, type[nn.Module]] = {"weighting": Weighting, "router": nn.Module}
"""Option -> the class of what is built."""

_METHODS: Mapping[str, tuple[str, ...]] = {
    "predict": ("node", "feature"),
    "shared_alpha": ("node",),
    "constant_alpha": ("node",),
    "weigh": ("node", "alpha"),
    "find_open": ("node", "alpha", "offset"),
}
"""Method of a weighting -> what it is called with."""


def check_callable(option: str, code: Any) -> None:
    """Raises UsageError if `code`, the value of an option, cannot be called with the arguments of that option.

    What is not callable, such as a name or a mask, is left to the option's own check.
    """
    if not callable(code):
        return
    base = _BASES.get(option)
    if base is not None and isinstance(code, type) and not issubclass(code, base):
        raise UsageError(f"{option} {_name(code)} is no {_name(base)}; derive the class from it")
    _check_arguments(f"{option} {_name(code)}", code, _ARGUMENTS[option])


def check_weighting(built: Any, code: Any) -> Weighting:
    """`built`, which `code` made. Raises UsageError if it is no `Weighting`, or its methods take other arguments."""
    name = _name(code)
    if not isinstance(built, Weighting):
        raise UsageError(f"weighting {name} gives {type(built).__name__}, which is no dgnet.graph.Weighting")
    needed = "predict" if built.reads_features else "shared_alpha"
    if getattr(type(built), needed) is getattr(Weighting, needed):
        flag = "True" if built.reads_features else "False"
        raise UsageError(f"weighting {name} has no method {needed}, which reads_features = {flag} needs")
    for method, arguments in _METHODS.items():
        if getattr(type(built), method) is not getattr(Weighting, method):
            _check_arguments(f"weighting {name}: {method}", getattr(built, method), arguments)
    return built


def _check_arguments(what: str, function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # of code in C, Python does not know it
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise UsageError(f"{what} must take ({', '.join(arguments)}), and takes {_shown(signature)}: {error}") from None


def _shown(signature: inspect.Signature) -> str:
    """The arguments of a signature, without their types."""
    plain = [argument.replace(annotation=inspect.Parameter.empty) for argument in signature.parameters.values()]
    return shorten(str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)), 100)


def _name(code: Any) -> str:
    """How messages call a class or function: its import path, where a user finds it."""
    path = {Weighting: "dgnet.graph.Weighting", nn.Module: "torch.nn.Module"}.get(code) or code_path(code)
    return path or getattr(code, "__qualname__", None) or shorten(repr(code), 60)
