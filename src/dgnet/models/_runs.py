"""Find the runs of a network: consecutive residual blocks that keep the shape of their feature, called one after the other.

One forward pass is traced with hooks. Letters: B batch, C channels, H and W height and width, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgnet.compat.torch import count_writes, find_tensors
from dgnet.errors import UsageError, reason

_BATCH = 3
"""Images in the traced pass. The first size of a run's feature must be this number."""

_WEIGHT_LAYERS = 2
"""A block has at least this number of convolutions and linear layers. Parts of blocks, such as an activation, have fewer."""

# Operations whose result still is the shortcut of a residual block: its input in another shape, format or scale.
_RESHAPING = {"view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "to", "float", "clone"}
_SCALING = {"mul", "__mul__", "__rmul__"}
_ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class Run:
    """Consecutive blocks that can become a stage.

    `parent`: the name of the module that holds the blocks; `blocks`: their names in it; `layout`: see `dgnet.graph.LAYOUTS`;
    `channels`: C of the feature that they keep.
    """

    parent: str
    blocks: tuple[str, ...]
    layout: str
    channels: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the blocks in the network. The first is that of the stage."""
        return tuple(join(self.parent, block) for block in self.blocks)


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


def join(parent: str, child: str) -> str:
    """The name of a child module in the network."""
    return f"{parent}.{child}" if parent else child


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
    trace = _trace(network, (_BATCH, in_chans, *image_size))
    blocks = _find_blocks(modules, trace, within)
    chains = [chain for chain in _find_chains(blocks) if len(chain) >= least_blocks and _is_within(chain[0].name, within)]
    runs = _choose(chains)
    found = tuple(_describe_run(chain, modules) for chain in runs)
    taken = {name for run in found for name in run.names}
    static = tuple(_explain(modules, blocks, taken, within))
    removable = tuple(block.name for block in blocks if block.call.is_residual and not block.obstacle)
    return Runs(found, static, removable)


# --- the traced pass


@dataclass
class _Call:
    """One call of a module.

    `input`: if the module was called with one tensor and nothing else. `readers`: the modules that were running when an
    operation read the output. `is_residual`: whether the input was added to something inside; `is_written`: changed in place.
    """

    name: str
    order: int
    input: Tensor | None
    output: Any = None
    version: int = 0
    readers: set[str] = field(default_factory=set)
    is_residual: bool = False
    is_written: bool = False


class _Trace(TorchFunctionMode):
    """The calls of all modules in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []  # in the order in which they ended
        self.open: list[_Call] = []  # the innermost last
        self.written: dict[int, list[_Call]] = {}  # by the id of an output
        self.shortcuts: dict[int, set[int]] = {}  # by the id of a tensor: ids of the inputs of calls that it is a view of
        self.kept: list[Any] = []  # Python may reuse the id of a freed tensor

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        single = args[0] if len(given) == 1 and args and isinstance(args[0], Tensor) else None
        self.open.append(_Call(name, 0, single, version=0 if single is None else count_writes(single)))

    def leave(self, output: Any) -> None:
        """The module that was called last returns."""
        call = self.open.pop()
        call.order, call.output = len(self.calls), output
        call.is_written = call.input is not None and count_writes(call.input) != call.version
        self.calls.append(call)
        if isinstance(output, Tensor):
            self.written.setdefault(id(output), []).append(call)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept.append((args, kwargs, result))
        if not find_tensors(result):
            return result  # such as `x.shape`, which reads no values
        read = find_tensors((args, kwargs))
        for tensor in read:
            for call in self.written.get(id(tensor), ()):
                call.readers.add(self.open[-1].name if self.open else "")
        name = getattr(func, "__name__", "")
        if name in _RESHAPING or name in _SCALING:
            origins = set().union(*({id(tensor)} | self.shortcuts.get(id(tensor), set()) for tensor in read))
            self.shortcuts.setdefault(id(result), set()).update(origins)
        if name in _ADDING:
            origins = set().union(*({id(tensor)} | self.shortcuts.get(id(tensor), set()) for tensor in read))
            for call in self.open:
                call.is_residual |= call.input is not None and id(call.input) in origins
        return result


def _trace(network: nn.Module, size: tuple[int, ...]) -> _Trace:
    """One forward pass of a copy of `network`. Raises UsageError if it does not take images of this size."""
    try:
        return _run(deepcopy(network).to("meta"), torch.empty(size, device="meta"))
    except Exception:  # a layer that reads values, or does not take the size: the CPU tells which
        pass
    try:
        return _run(deepcopy(network).to("cpu", torch.float32), torch.randn(size, generator=torch.Generator().manual_seed(0)))
    except Exception as error:  # a module may raise anything
        images = "×".join(map(str, size))
        raise UsageError(
            f"{type(network).__name__} cannot be converted: it takes no images of {images} ({type(error).__name__}:"
            f" {reason(error)}); give another image_size"
        ) from error


def _run(network: nn.Module, images: Tensor) -> _Trace:
    trace = _Trace()
    for name, module in network.named_modules():
        if not name or isinstance(module, nn.Identity):
            continue

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            trace.enter(name, args, kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            trace.leave(output)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True)
    with torch.no_grad(), trace:
        network.eval()(images)
    return trace


# --- from calls to runs


@dataclass
class _Block:
    """A module that could be a block: its call, and why it cannot be part of a stage ("" if it can)."""

    name: str
    call: _Call
    obstacle: str

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def _find_blocks(modules: Mapping[str, nn.Module], trace: _Trace, within: Sequence[str] | None) -> list[_Block]:
    """The modules with at least `_WEIGHT_LAYERS` layers, in the order of their calls."""
    by_name: dict[str, list[_Call]] = {}
    for call in trace.calls:
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


def _find_obstacle(calls: Sequence[_Call], shared: str, must_be_residual: bool) -> str:
    """Why a module cannot be part of a stage; "" if it can."""
    call = calls[0]
    if len(calls) > 1:
        return f"it is called {len(calls)} times"
    if shared:
        return f"it shares parameters with {shared}"
    if call.input is None:
        return "it is called with more than one tensor"
    if not isinstance(call.output, Tensor):
        return "it does not return one tensor"
    if call.input.shape != call.output.shape:
        return "it changes the shape"
    if call.input.ndim not in (3, 4) or len(call.input) != _BATCH:
        return "its input is not one map or one set of tokens for each image"
    if call.is_written:
        return "it changes its input in place"
    return "" if call.is_residual or not must_be_residual else "it has no residual shortcut"


def _find_chains(blocks: Iterable[_Block]) -> list[list[_Block]]:
    """The sequences of blocks of one parent, each of which reads the output of the one before, and alone."""
    by_parent: dict[str, list[_Block]] = {}
    for block in blocks:
        by_parent.setdefault(block.parent, []).append(block)
    chains: list[list[_Block]] = []
    for siblings in by_parent.values():
        chain: list[_Block] = []
        for block in siblings:
            if chain and (block.obstacle or not _follows(chain[-1], block)):
                chains.append(chain)
                chain = []
            chain = [] if block.obstacle else [*chain, block]
        chains.append(chain)
    return [chain for chain in chains if chain]


def _follows(before: _Block, block: _Block) -> bool:
    if block.call.input is not before.call.output:
        return False
    return all(reader == block.name or reader.startswith(f"{block.name}.") for reader in before.call.readers)


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
    names = tuple(block.name.rpartition(".")[2] for block in chain)
    return Run(chain[0].parent, names, layout, shape[1] if layout == "NCHW" else shape[-1])


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
