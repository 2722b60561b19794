"""A static network of fewer blocks: the baseline of the same cost for a network that skips blocks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from torch import nn

from dgnet.errors import UsageError, did_you_mean
from dgnet.models._inputs import find_channels, find_image_size
from dgnet.models._runs import find_runs


class RemovedBlock(nn.Identity):
    """The place of a residual block that was removed: it passes its input on."""


def remove_blocks(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of `network` without the residual blocks `names`, which keep the shape of their feature.

    Raises UsageError for a name that is not of such a block.
    """
    known = find_runs(network, find_image_size(network), find_channels(network)).removable
    shortened = deepcopy(network)
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise UsageError(
                f"without_blocks: {name!r} is no residual block of {type(network).__name__} that keeps the shape of its"
                f" feature{did_you_mean(str(name), known)}; such blocks: {listed}"
            )
        shortened.set_submodule(name, RemovedBlock())
    return shortened


def removed_blocks(network: nn.Module) -> tuple[str, ...]:
    """The names of the blocks that `remove_blocks` removed."""
    return tuple(name for name, module in network.named_modules() if isinstance(module, RemovedBlock))
