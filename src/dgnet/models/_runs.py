"""Find the runs of a network: consecutive residual blocks that keep the shape of their feature, called one after the other.

Letters: B batch, C channels, H and W height and width, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from timm.layers import LayerNorm, LayerNormFp32
from torch import Tensor, nn

from dgnet.compat.timm import FeatureGetterNet
from dgnet.compat.torch import find_leaves
from dgnet.errors import UsageError
from dgnet.graph import Further
from dgnet.models._calls import Call, group_by_name, is_inside, trace_calls

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
    """The runs of `network`, found by forward passes on the meta device, or on the CPU if the network cannot run on it.

    In training mode the network must call the blocks of a run in the same way as in evaluation.

    `image_size`: height and width in pixels. `within`: the modules whose blocks become stages, also those without a residual
    shortcut; None: all modules, residual blocks only. `least_blocks`: in a run.

    Raises UsageError for a network that does not take such images, and for an unknown name in `within`.
    """
    modules = dict(network.named_modules())
    for name in within or ():
        if name not in modules:
            raise UsageError(f"stages names {name!r}, which {type(network).__name__} does not have")
    traces = trace_calls(network, in_chans, image_size)
    blocks = _find_blocks(modules, traces, within)
    may_tap = isinstance(network, FeatureGetterNet)  # the features between blocks, which places in a stage put out for it
    chains = [chain for chain in _find_chains(blocks, may_tap) if len(chain) >= least_blocks]
    runs = _choose([chain for chain in chains if _is_within(chain[0].name, within)])
    found = tuple(_describe_run(chain, modules, traces[0]) for chain in runs)
    taken = {name for run in found for name in run.names}
    static = tuple(_explain(modules, blocks, taken, within))
    removable = tuple(block.name for block in blocks if block.call.is_residual and not block.obstacle)
    return Runs(found, static, removable)


@dataclass
class _Block:
    """A module that could be a block: its calls, and why it cannot be part of a stage ("" if it can).

    `calls`: one in evaluation, then one in each traced pass in training. `cut`: why a run ends after it, if training is why.
    """

    name: str
    calls: list[Call]
    obstacle: str
    cut: str = ""

    @property
    def call(self) -> Call:
        """The call in evaluation."""
        return self.calls[0]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def _find_blocks(
    modules: Mapping[str, nn.Module], traces: Sequence[Sequence[Call]], within: Sequence[str] | None
) -> list[_Block]:
    """The modules with at least `_WEIGHT_LAYERS` layers, in the order of their calls. `traces`: see `_Block.calls`."""
    by_name = [group_by_name(trace) for trace in traces]
    owners: dict[int, set[str]] = {}  # by the id of a parameter
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    blocks = []
    for name, calls in by_name[0].items():
        module = modules[name]
        layers = sum(isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())
        if layers < _WEIGHT_LAYERS or not any(module.children()):
            continue
        shared = next((o for p in module.parameters() for o in owners[id(p)] if not is_inside(o, name)), "")
        in_training = [each.get(name, []) for each in by_name[1:]]
        obstacle = _find_obstacle(calls, shared, must_be_residual=within is None)
        obstacle = obstacle or next(filter(None, (_find_change(calls[0], others) for others in in_training)), "")
        blocks.append(_Block(name, [calls[0], *(others[0] for others in in_training if others)], obstacle))
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
    if not _is_shared(call):
        return _PER_IMAGE
    if not isinstance(call.output, Tensor):
        return "it does not return one tensor"
    if call.input.shape != call.output.shape:
        return "it changes the shape"
    if call.input.ndim not in (3, 4) or len(call.input) != call.batch:
        return "its input is not one map or one set of tokens for each image"
    if call.is_written:
        return "it changes its input in place"
    return "" if call.is_residual or not must_be_residual else "it has no residual shortcut"


_PER_IMAGE = "it is called with further values for each image"


def _find_change(call: Call, in_training: Sequence[Call]) -> str:
    """Why a module that can be part of a stage in evaluation, where it is called as in `call`, cannot be so in training."""
    if not in_training:
        return "in training it is not always called"
    obstacle = _find_obstacle(in_training, "", must_be_residual=False)
    if obstacle:
        return obstacle if obstacle == _PER_IMAGE else f"in training {obstacle}"
    # The passes have different numbers of images.
    return "" if _find_sizes(call) == _find_sizes(in_training[0]) else _PER_IMAGE


def _find_sizes(call: Call) -> list[object]:
    """The shapes of tensors among the further arguments, and None for each plain value."""
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in find_leaves(call.further)]


def _is_shared(call: Call) -> bool:
    """Whether the further arguments can go to all blocks of a stage: plain values, tensors without a part for each image."""
    return all(
        leaf.shape[:1] != (call.batch,) if isinstance(leaf, Tensor) else isinstance(leaf, bool | int | float | str | None)
        for leaf in find_leaves(call.further)
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
    """Whether `block` reads the output of `before`, and nothing else does, in every pass."""
    for number, (first, second) in enumerate(zip(before.calls, block.calls, strict=True)):
        is_next = second.input is first.output and _is_called_like(first.further, second.further)
        if not is_next or not (may_tap or all(is_inside(reader, block.name) for reader in first.readers)):
            if number:
                before.cut = block.cut = "in training, a feature between it and the next block is changed or read elsewhere"
            return False
    return True


def _is_called_like(first: Further, second: Further) -> bool:
    """Whether the arguments besides the feature are the same."""
    arguments = [(len(further.values), *further.named) for further in (first, second)]
    return arguments[0] == arguments[1] and all(
        one is other or (not isinstance(one, Tensor) and one == other)
        for one, other in zip(find_leaves(first), find_leaves(second), strict=True)
    )


def _is_within(name: str, within: Sequence[str] | None) -> bool:
    return within is None or any(is_inside(name, other) for other in within)


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


def _describe_run(chain: Sequence[_Block], modules: Mapping[str, nn.Module], trace: Sequence[Call]) -> Run:
    shape = chain[0].call.output.shape
    layout = _find_layout(chain[0], modules, trace)
    names = tuple(block.name for block in chain)
    further = chain[0].call.further
    arguments: set[int | str] = {*range(1, len(further.values) + 1), *further.named}
    return Run(names, layout, shape[1] if layout == "NCHW" else shape[-1], frozenset(arguments))


def _find_layout(block: _Block, modules: Mapping[str, nn.Module], trace: Sequence[Call]) -> str:
    """The layout of the feature that a block keeps: from the first layer that says it, else from sizes that are equal."""
    shape = block.call.output.shape
    if len(shape) == 3:
        return "NLC"
    inside = [call for call in trace if call.name.startswith(f"{block.name}.") and call.order < block.call.order]
    direct = [call for call in inside if call.input is block.call.input]
    for call in (*direct, *inside):
        axis, channels = _find_axis(modules[call.name])
        # A layer that reads something else, such as the feature with its channels in another place, may not fit.
        if axis and call.input is not None and call.input.shape == shape and shape[axis] == channels:
            return "NCHW" if axis == 1 else "NHWC"
    return "NHWC" if shape[1] == shape[2] != shape[3] else "NCHW"


def _find_axis(layer: nn.Module) -> tuple[int, int]:
    """The axis that holds the channels in what a layer reads, and their number; (0, 0) if the layer does not say."""
    if isinstance(layer, nn.Conv2d):
        return 1, layer.in_channels
    if isinstance(layer, nn.BatchNorm2d):
        return 1, layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return 1, layer.num_channels
    if isinstance(layer, nn.Linear):
        return 3, layer.in_features
    if type(layer) in _LAST_NORMS:
        normalized: Any = layer.normalized_shape
        return 3, int(normalized[-1])
    return 0, 0


_LAST_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)  # other subclasses in timm are for channels first


def _explain(
    modules: Mapping[str, nn.Module], blocks: Sequence[_Block], taken: set[str], within: Sequence[str] | None
) -> Iterable[StaticBlock]:
    """The blocks that stay static: the innermost ones that are in no run and contain none.

    A block is a child of a container, a residual block, or of a class of which a run has blocks: stages may be no containers.
    """
    classes = {type(modules[name]) for name in taken}
    inside = [block for block in blocks if not any(block.name.startswith(f"{name}.") for name in taken)]
    outside = [b for b in inside if b.name not in taken and not any(name.startswith(f"{b.name}.") for name in taken)]
    held = [b for b in outside if _is_held(modules, b) or b.call.is_residual or type(modules[b.name]) in classes]
    names = [block.name for block in held]
    for block in held:
        is_container = isinstance(modules[block.name], nn.Sequential | nn.ModuleList)
        if is_container and any(other.startswith(f"{block.name}.") for other in names):
            continue
        if any(block.name.startswith(f"{other}.") for other in names if not isinstance(modules[other], nn.Sequential)):
            continue
        why = block.obstacle or block.cut or "it is one block only, and has no gate"
        yield StaticBlock(block.name, why if _is_within(block.name, within) else "it is in none of the named stages")


def _is_held(modules: Mapping[str, nn.Module], block: _Block) -> bool:
    """Whether a container holds the block."""
    return isinstance(modules[block.parent], nn.Sequential | nn.ModuleList)
