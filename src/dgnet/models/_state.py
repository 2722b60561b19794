"""State dicts as other programs write them: names with the prefixes of wrappers, entries that are no tensors."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import is_tensor_like

from dgnet.errors import UsageError

_WRAPPERS = ("module.", "_orig_mod.", "network.")
"""Of DataParallel and its kind, of `torch.compile`, and of dgnet's training."""


def unwrap_names(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """`state_dict` without the prefixes of wrappers, each of which stands before all names.

    Raises UsageError if a name is no text or a value is no tensor; the extra state of a module may be any value.
    """
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise UsageError(f"a state dict has names of tensors as keys, got {name!r}")
        if not (is_tensor_like(value) or name.endswith("_extra_state")):
            raise UsageError(f"a state dict holds tensors, got {name}={repr(value)[:60]}")
    while prefix := next((wrapper for wrapper in _WRAPPERS if _is_before_all(state_dict, wrapper)), ""):
        state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict


def check_finite(state_dict: Mapping[str, Tensor]) -> None:
    """Raises UsageError if a tensor holds NaN or infinity."""
    for name, tensor in state_dict.items():
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor  # torch cannot ask float8
        if (tensor.is_floating_point() or tensor.is_complex()) and not values.isfinite().all():
            raise UsageError(f"{name} holds values that are not finite")


def match_names(state_dict: Mapping[str, Any], own: Container[str]) -> Mapping[str, Any]:
    """`state_dict` without a prefix before all names: that of an attribute which held the network, such as Lightning's `model.`

    `own`: the network's names. Without a prefix that leads to one of them, `state_dict` stays as it is.
    """
    matched = state_dict
    while matched and not any(name in own for name in matched):
        first, dot, _ = next(iter(matched)).partition(".")
        if not dot or not _is_before_all(matched, f"{first}."):
            return state_dict
        matched = {name.removeprefix(f"{first}."): value for name, value in matched.items()}
    return matched


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """The name of a tensor with the first of `prefixes` that it begins with, old -> new, replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _is_before_all(state_dict: Mapping[str, Any], prefix: str) -> bool:
    return bool(state_dict) and all(name.startswith(prefix) for name in state_dict)


class LoadsWrapped(nn.Module):
    """Mixin of all networks: `load_state_dict` also takes names with the prefixes of wrappers."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Raises UsageError if a name is no text or a value is no tensor."""
        if isinstance(state_dict, Mapping):  # otherwise torch raises its own TypeError
            state_dict = unwrap_names(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
