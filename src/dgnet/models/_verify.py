"""Whether a converted network computes what its static network computes: both run once on random images, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.compat.torch import find_tensors
from dgnet.errors import UsageError, reason
from dgnet.models._agreement import find_tolerance
from dgnet.models._isolation import copy_for_passes, find_device, find_dtype, plain_context, seeded

_IMAGES = 2


@dataclass
class _Pass:
    """What one forward pass gave. `features`: by the name of a module, what its calls put out."""

    outputs: list[Tensor]
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def find_difference(
    static: nn.Module, converted: nn.Module, stages: Mapping[str, str], in_chans: int, image_size: tuple[int, int]
) -> str:
    """Why `converted` does not compute what `static` computes; "" if it does, or if one of them is on the meta device.

    Copies of both run once in evaluation mode on the same random images, in their own precision. The networks, the user's hooks
    and random numbers stay as they are. `stages`: the name of each stage -> that of its last block, after which features are
    compared.

    Raises UsageError if the static network does not run.
    """
    if any(tensor.is_meta for network in (static, converted) for tensor in network.parameters()):
        return ""
    images = torch.randn((_IMAGES, in_chans, *image_size), generator=torch.Generator().manual_seed(0), device="cpu")
    images = images.to(find_device(static), find_dtype(static))
    with plain_context(static):
        try:
            expected = _observe(static, images, stages)
        except UsageError:
            raise
        except Exception as error:  # a module may raise anything
            raise UsageError(
                f"{type(static).__name__} cannot be converted: it does not run on images of {tuple(images.shape)}"
                f" ({type(error).__name__}: {reason(error)})"
            ) from error
        try:
            found = _observe(converted, images, stages)
        except UsageError as error:
            return str(error)
        except Exception as error:
            return f"its forward pass reads parts of blocks that are in a stage now ({type(error).__name__}: {reason(error)})"
    for stage in stages:
        calls = found.calls.get(stage, 0)
        if calls != 1:
            often = f"called {calls} times" if calls else "not called: the network holds its blocks in another place too"
            return f"stage {stage} is {often}"
    tolerance = find_tolerance(static)
    for stage, last in stages.items():
        if not _are_close(found.features.get(last, []), expected.features.get(last, []), tolerance):
            return f"the feature after stage {stage} differs"
    return "" if _are_close(found.outputs, expected.outputs, tolerance) else "the output differs"


@torch.no_grad()
def _observe(network: nn.Module, images: Tensor, stages: Mapping[str, str]) -> _Pass:
    """Run a copy of `network`."""
    copied = copy_for_passes(network).eval()
    seen = _Pass([])

    def count(name: str) -> Any:
        def note(*of_hook: Any) -> None:
            seen.calls[name] = seen.calls.get(name, 0) + 1

        return note

    def keep(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:  # a copy: the network may change it in place
            seen.features.setdefault(name, []).extend(tensor.clone() for tensor in find_tensors(output))

        return note

    for stage, last in stages.items():
        copied.get_submodule(stage).register_forward_hook(count(stage))
        copied.get_submodule(last).register_forward_hook(keep(last))
    with seeded(network):
        seen.outputs = find_tensors(copied(images.clone()))
    return seen


def _are_close(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> bool:
    """Whether tensors differ by rounding only, relative to the largest value of each. Values that overflow are left out."""
    found, expected = list(found), list(expected)
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return False
    for one, other in zip(found, expected, strict=True):
        finite = other.isfinite()
        if not (other.is_floating_point() and finite.any()):
            continue
        wanted = other[finite].float()
        difference = (one[finite].float() - wanted).abs().max()
        if not difference <= tolerance * wanted.abs().max().clamp(min=1e-12):
            return False
    return True
