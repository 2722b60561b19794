"""Find the runs of a network: consecutive residual blocks that keep the shape of their feature, called one after the other.

Letters: B batch, C channels, H and W height and width, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn

from dgnet.compat.timm import FeatureGetterNet
from dgnet.compat.torch import find_leaves
from dgnet.errors import UsageError
from dgnet.graph import Further
from dgnet.models._calls import BATCH, Call, trace_calls

_WEIGHT_LAYERS = 2
"""A block has at least this number of convolutions and linear layers. Parts of blocks, such as an activation, have fewer."""


@dataclass(frozen=True)
class Run:
    """Consecutive blocks that can become a stage.

    `names`: of the blocks in the network; the first is that of the stage. `layout`: see `dgnet.graph.LAYOUTS`. `channels`: C of
    the feature that they keep. `arguments`: places (from 1) and names of what all blocks are called with besides it.
    """

    names: tuple[str, ...]
    layout: str
    channels: int
    arguments: frozenset[int | str] = frozenset()


@dataclass(frozen=True)
class StaticBlock:
    """A block that stays static, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """The runs of a network in the order in which they are called, and the blocks that are in none.

    `removable`: the names of all residual blocks that keep the shape, also those that stand alone.
    """

    runs: tuple[Run, ...]
    static: tuple[StaticBlock, ...]
    removable: tuple[str, ...]


def find_runs(
    network: nn.Module,
    image_size: tuple[int, int],
    in_chans: int,
    within: Sequence[str] | None = None,
    least_blocks: int = 2,
) -> Runs:
    """The runs of `network`, found by one forward pass on the meta device, or on the CPU if the network cannot run on it.

    `image_size`: height and width in pixels. `within`: the modules whose blocks become stages, also those without a residual
    shortcut; None: all modules, residual blocks only. `least_blocks`: in a run.

    Raises UsageError for a network that does not take such images, and for an unknown name in `within`.
    """
    modules = dict(network.named_modules())
    for name in within or ():
        if name not in modules:
            raise UsageError(f"stages names {name!r}, which {type(network).__name__} does not have")
    blocks = _find_blocks(modules, trace_calls(network, in_chans, image_size), within)
    may_tap = isinstance(network, FeatureGetterNet)  # the features between blocks, which places in a stage put out for it
    chains = [chain for chain in _find_chains(blocks, may_tap) if len(chain) >= least_blocks]
    runs = _choose([chain for chain in chains if _is_within(chain[0].name, within)])
    found = tuple(_describe_run(chain, modules) for chain in runs)
    taken = {name for run in found for name in run.names}
    static = tuple(_explain(modules, blocks, taken, within))
    removable = tuple(block.name for block in blocks if block.call.is_residual and not block.obstacle)
    return Runs(found, static, removable)


@dataclass
class _Block:
    """A module that could be a block: its call, and why it cannot be part of a stage ("" if it can)."""

    name: str
    call: Call
    obstacle: str

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def _find_blocks(modules: Mapping[str, nn.Module], traced: Sequence[Call], within: Sequence[str] | None) -> list[_Block]:
    """The modules with at least `_WEIGHT_LAYERS` layers, in the order of their calls."""
    by_name: dict[str, list[Call]] = {}
    for call in traced:
        by_name.setdefault(call.name, []).append(call)
    owners: dict[int, set[str]] = {}  # by the id of a parameter
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    blocks = []
    for name, calls in by_name.items():
        module = modules[name]
        layers = sum(isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())
        if layers < _WEIGHT_LAYERS or not any(module.children()):
            continue
        shared = next((o for p in module.parameters() for o in owners[id(p)] if o != name and not o.startswith(f"{name}.")), "")
        must_be_residual = within is None
        blocks.append(_Block(name, calls[0], _find_obstacle(calls, shared, must_be_residual)))
    return sorted(blocks, key=lambda block: block.call.order)


def _find_obstacle(calls: Sequence[Call], shared: str, must_be_residual: bool) -> str:
    """Why a module cannot be part of a stage; "" if it can."""
    call = calls[0]
    if len(calls) > 1:
        return f"it is called {len(calls)} times"
    if shared:
        return f"it shares parameters with {shared}"
    if call.input is None:
        return "it is not called with one tensor"
    if not _is_shared(call.further):
        return "it is called with further values for each image"
    if not isinstance(call.output, Tensor):
        return "it does not return one tensor"
    if call.input.shape != call.output.shape:
        return "it changes the shape"
    if call.input.ndim not in (3, 4) or len(call.input) != BATCH:
        return "its input is not one map or one set of tokens for each image"
    if call.is_written:
        return "it changes its input in place"
    return "" if call.is_residual or not must_be_residual else "it has no residual shortcut"


def _is_shared(further: Further) -> bool:
    """Whether arguments can go to all blocks of a stage: plain values, and tensors that do not hold one part for each image."""
    return all(
        leaf.shape[:1] != (BATCH,) if isinstance(leaf, Tensor) else isinstance(leaf, bool | int | float | str | None)
        for leaf in find_leaves(further)
    )


def _find_chains(blocks: Iterable[_Block], may_tap: bool) -> list[list[_Block]]:
    """The sequences of blocks of one parent, each of which reads the output of the one before.

    `may_tap`: whether other modules may read it too.
    """
    by_parent: dict[str, list[_Block]] = {}
    for block in blocks:
        by_parent.setdefault(block.parent, []).append(block)
    chains: list[list[_Block]] = []
    for siblings in by_parent.values():
        chain: list[_Block] = []
        for block in siblings:
            if chain and (block.obstacle or not _follows(chain[-1], block, may_tap)):
                chains.append(chain)
                chain = []
            chain = [] if block.obstacle else [*chain, block]
        chains.append(chain)
    return [chain for chain in chains if chain]


def _follows(before: _Block, block: _Block, may_tap: bool) -> bool:
    if block.call.input is not before.call.output or not _is_called_like(before, block):
        return False
    return may_tap or all(reader == block.name or reader.startswith(f"{block.name}.") for reader in before.call.readers)


def _is_called_like(first: _Block, second: _Block) -> bool:
    """Whether the arguments besides the feature are the same."""
    arguments = [(len(block.call.further.values), *block.call.further.named) for block in (first, second)]
    leaves, others = find_leaves(first.call.further), find_leaves(second.call.further)
    return arguments[0] == arguments[1] and all(
        one is other or (not isinstance(one, Tensor) and one == other) for one, other in zip(leaves, others, strict=True)
    )


def _is_within(name: str, within: Sequence[str] | None) -> bool:
    return within is None or any(name == other or name.startswith(f"{other}.") for other in within)


def _choose(chains: list[list[_Block]]) -> list[list[_Block]]:
    """The chains that become runs. Of those inside one another: the outer, unless it is one block or the inner are longer."""
    chosen: list[list[_Block]] = []
    for chain in sorted(chains, key=lambda chain: chain[0].name.count(".")):
        if any(_contains(other, chain) for other in chosen):
            continue
        # Only the outermost of the chains inside count: they are what would be chosen instead.
        inner = [other for other in chains if _contains(chain, other)]
        inner = [other for other in inner if not any(_contains(between, other) for between in inner)]
        if inner and (len(chain) == 1 or mean(map(len, inner)) > len(chain)):
            continue
        chosen.append(chain)
    return sorted(chosen, key=lambda chain: chain[0].call.order)


def _contains(outer: Sequence[_Block], inner: Sequence[_Block]) -> bool:
    return any(inner[0].name.startswith(f"{block.name}.") for block in outer)


def _describe_run(chain: Sequence[_Block], modules: Mapping[str, nn.Module]) -> Run:
    shape = chain[0].call.output.shape
    layout = _find_layout(shape, modules[chain[0].name])
    names = tuple(block.name for block in chain)
    further = chain[0].call.further
    arguments: set[int | str] = {*range(1, len(further.values) + 1), *further.named}
    return Run(names, layout, shape[1] if layout == "NCHW" else shape[-1], frozenset(arguments))


def _find_layout(shape: torch.Size, block: nn.Module) -> str:
    """The layout of a feature from its shape, traced with square images, and from the first layer that reads it."""
    if len(shape) == 3:
        return "NLC"
    if (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return "NHWC" if shape[1] == shape[2] else "NCHW"
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == shape[1]:
            return "NCHW"
        if isinstance(layer, nn.Linear) and layer.in_features == shape[3]:
            return "NHWC"
    return "NCHW"


def _explain(
    modules: Mapping[str, nn.Module], blocks: Sequence[_Block], taken: set[str], within: Sequence[str] | None
) -> Iterable[StaticBlock]:
    """The blocks that stay static: children of containers, the innermost ones, that are in no run and contain none."""
    inside = [block for block in blocks if not any(block.name.startswith(f"{name}.") for name in taken)]
    outside = [b for b in inside if b.name not in taken and not any(name.startswith(f"{b.name}.") for name in taken)]
    held = [b for b in outside if isinstance(modules[b.parent], nn.Sequential | nn.ModuleList) or b.call.is_residual]
    names = [block.name for block in held]
    for block in held:
        is_container = isinstance(modules[block.name], nn.Sequential | nn.ModuleList)
        if is_container and any(other.startswith(f"{block.name}.") for other in names):
            continue
        if any(block.name.startswith(f"{other}.") for other in names if not isinstance(modules[other], nn.Sequential)):
            continue
        why = block.obstacle or "it is one block only, and has no gate"
        yield StaticBlock(block.name, why if _is_within(block.name, within) else "it is in none of the named stages")
