"""What a converted network consists of: its stages, the places of their blocks, and timm's interface.

Letters: B batch, C channels, H and W height and width, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn
from torch.fx import Proxy

from dgnet.compat.timm import FeatureGetterNet
from dgnet.errors import UsageError
from dgnet.graph import ContextStack, DenseWalk, DynamicGraph, Further, StageNodes, aggregate, sum_in_groups
from dgnet.models._agreement import Agreement
from dgnet.models._calls import drop_missing
from dgnet.models._dynamic import DynamicNetwork
from dgnet.models._runs import Run, StaticBlock
from dgnet.models._state import rename, unwrap_names

_STEPS: ContextStack[dict[str, list[Tensor]]] = ContextStack("steps")
"""Stage, by its name -> what the last forward pass of the stage put out after each block."""


def keep_steps() -> AbstractContextManager[None]:
    """Inside the `with` block each block's place puts out the sum so far, as in the static network; see `ConvertedStage`."""
    return _STEPS.hold({})


class ConvertedStage(DynamicGraph):
    """A run of blocks as a graph, in the place of the run's first block. It maps a feature to one of the same shape.

    Usually it puts out the feature after the last block, and the places of the other blocks pass it on. Inside `keep_steps`
    each place puts out what the static network has there: Σ α_i x_i over the input node and the blocks up to that place, α
    being the weights of the output node.
    """

    arguments: frozenset[int | str] = frozenset()
    """Places and names of the arguments, besides the feature, with which every block of the run is called."""
    name: str = ""
    """In the network. Replicas of the stage (`nn.DataParallel`) have it too."""

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """As `DynamicGraph.forward`. Further arguments go to every block; those that are not in `arguments` must be None."""
        further = drop_missing(more, named)
        if isinstance(x, Proxy):  # a tracer also passes arguments that are None later
            return self._trace(x, further)
        refused = {*range(1, len(further.values) + 1), *further.named} - self.arguments
        if refused:
            raise UsageError(
                f"the blocks of a converted stage were called without argument {min(refused, key=str)!r} in the conversion, and"
                " cannot be called with it now; let the network call them in the same way, or convert others with stages"
            )
        kept = _STEPS.values()
        if not kept:
            walk = self.start_walk(x)
            walk.further = further
            return self._follow(walk)
        steps = _StepWalk(self, x)
        steps.further = further
        self._follow(steps)
        kept[-1][self.name] = steps.steps
        return steps.steps[0]

    def find_empty_feature(self, x: Tensor, further: Further) -> Tensor:
        """All blocks keep the shape, and some cannot run on no samples."""
        return x[:0]


class _StepWalk(DenseWalk):
    """A dense walk that keeps the sum after each block."""

    def __init__(self, stage: StageNodes, x: Tensor) -> None:
        super().__init__(stage, x)
        self.steps: list[Tensor] = []

    def run(self, node: int, weights: Tensor, is_open: Tensor | None, runs: Tensor | None) -> Any:
        if node != self.topology.output:
            return super().run(node, weights, is_open, runs)
        for last in self.topology.blocks:
            senders = slice(last + 1)
            opened = None if is_open is None else is_open[:, senders]
            sum_open = partial(aggregate, is_open=opened)
            self.steps.append(sum_in_groups(sum_open, self.features[senders], weights[:, senders], self.stage.layout))
        return self.steps[-1]


class Joined(nn.Identity):
    """The place of a block that is part of the stage before it: it passes its input on. See `ConvertedStage`."""

    def __init__(self, stage: ConvertedStage, step: int) -> None:
        super().__init__()
        self.of = (stage,)  # in a tuple: it is no child module of this one
        self.step = step

    def forward(self, input: Tensor, *more: Any, **named: Any) -> Tensor:
        """`input`; inside `keep_steps` the sum after this block."""
        kept = _STEPS.values()
        name = self.of[0].name  # of a replica the first stage's
        if kept and name in kept[-1]:
            return kept[-1][name][self.step]
        return input


@dataclass(frozen=True)
class ConvertedRun:
    """A run that became a stage: where it was, its blocks' names in the network, and its feature."""

    name: str  # of the stage's module, which was the first block's
    blocks: tuple[str, ...]
    block_class: str
    layout: str
    channels: int

    @classmethod
    def of(cls, run: Run, block: nn.Module) -> ConvertedRun:
        """The description of `run`, whose first block is `block`."""
        return cls(run.names[0], run.names, type(block).__name__, run.layout, run.channels)


@dataclass(frozen=True)
class Conversion:
    """The report of a conversion: what became dynamic, and what stayed static and why."""

    stages: tuple[ConvertedRun, ...]
    static: tuple[StaticBlock, ...]
    within: str | tuple[str, ...] = "auto"  # the modules that were named to be converted
    agreement: Agreement | None = None  # with the static network on the images of the check; None: not checked


class ConvertedNetwork(DynamicNetwork):
    """Mixin before the class of a network whose runs became stages; `dgnet.convert` makes such classes."""

    conversion: Conversion
    static_class: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the static class's, which may need arguments or enter the class in a list."""

    def stored_options(self) -> dict[str, Any]:
        """Plain arguments of `create_model` that convert a network in the same way."""
        within = self.conversion.within
        return {**super().stored_options(), "dynamic": True, "stages": within if isinstance(within, str) else list(within)}

    @property
    def original_names(self) -> Mapping[str, str]:
        """Prefixes of parameter names here -> prefixes of the same parameters in the static network."""
        return {dynamic: static for static, dynamic in self.static_names.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Stages that are static blocks in `state_dict` are loaded too, and keep their weightings and gates."""
        if isinstance(state_dict, Mapping):
            state_dict = self.from_static(unwrap_names(state_dict))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def from_static(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """`state_dict` with static blocks as nodes of stages, and the present weightings and gates of these stages."""
        # Parameters without buffers have no mask.
        signs = {name: (f"{name}.mask", f"{name}.nodes.") for name in self.graph_names}
        static = [name for name, sign in signs.items() if not any(other.startswith(sign) for other in state_dict)]
        names = {old: new for old, new in self.static_names.items() if new.partition(".nodes.")[0] in static}
        added = {name: value for name, value in self.state_dict().items() if self._is_added(name, static)}
        return {**added, **{rename(name, names): value for name, value in state_dict.items()}} if static else state_dict

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """As the static network's: a feature between two blocks of a stage is the sum so far."""
        with keep_steps() if self._taps_stages() else nullcontext():
            return super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """As the static network's. Raises UsageError, and changes nothing, if it would remove a part of a stage."""
        # First on a copy that shares the tensors: a refusal must not leave the network in parts.
        shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())}
        trial = deepcopy(self, shared)
        super(DynamicNetwork, trial).prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        left = {name for name, module in trial.named_modules() if isinstance(module, ConvertedStage | Joined)}
        stages = []
        for run in self.conversion.stages:
            missing = [name for name in run.blocks if name not in left]
            if missing and len(missing) < len(run.blocks):
                raise UsageError(
                    f"pruning would cut the stage {run.name}: {missing[0]} goes, {run.blocks[0]} stays; prune the static"
                    " network, then convert it"
                )
            stages += [] if missing else [run]
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self.conversion = replace(self.conversion, stages=tuple(stages))
        blocks = {f"{name}." for run in stages for name in run.blocks}
        self.static_names = {old: new for old, new in self.static_names.items() if old in blocks}
        return kept

    def no_weight_decay(self) -> set[str]:
        """The static network's names, as they are here, and those of thresholds and learned edge weights."""
        static: set[str] = getattr(super(DynamicNetwork, self), "no_weight_decay", set)()
        own = {name for name, _ in self.named_parameters()}  # some networks look for names, which then are those here
        renamed = {name if name in own else rename(name, self.static_names) for name in static}
        return renamed | super().no_weight_decay()

    def group_matcher(self, coarse: bool = False) -> Any:
        """timm's parameter groups of the static network. What decides in a stage is in the group of its first block."""
        matcher = getattr(super(DynamicNetwork, self), "group_matcher", None)
        if matcher is None:
            return lambda name: 0
        names = self.original_names
        static = _Named({rename(name, names): parameter for name, parameter in self.named_parameters()})
        groups: dict[str, int] = group_parameters(static, matcher(coarse=coarse), reverse=True)  # type: ignore[arg-type]
        return lambda name: groups.get(rename(name, names), float("inf"))

    def _taps_stages(self, prefix: str = "") -> bool:
        """Whether features between the blocks of a stage may be asked for. To keep them takes a dense pass.

        `prefix`: before the names of modules, where `feature_info` names them without.
        """
        infos: Any = getattr(self, "feature_info", None)
        infos = infos.get_dicts() if hasattr(infos, "get_dicts") else infos
        inside = {name for run in self.conversion.stages for name in run.blocks[:-1]}
        return not infos or any(f"{prefix}{info['module']}" in inside for info in infos)

    @staticmethod
    def _is_added(name: str, stages: Sequence[str]) -> bool:
        """Whether a tensor belongs to one of the `stages`, and to no block in it."""
        return any(name.startswith(f"{stage}.") and not name.startswith(f"{stage}.nodes.") for stage in stages)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time: a pickle holds the static class."""
        return _rebuild, (self.static_class,), self.__dict__.copy()


class ConvertedFeatures(ConvertedNetwork):
    """Mixin before timm's feature extractor, which calls the `forward_intermediates` of a network inside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the static network's: a feature between two blocks of a stage is the sum so far."""
        with keep_steps() if self._taps_stages("model.") else nullcontext():
            return super().forward(*args, **kwargs)


@dataclass
class _Named:
    """Parameters under other names, in the form that timm's grouping reads."""

    parameters: dict[str, nn.Parameter]

    def named_parameters(self) -> Any:
        """Pairs of name and parameter."""
        return self.parameters.items()


_CLASSES: dict[type[nn.Module], type[ConvertedNetwork]] = {}


def converted_class(static: type[nn.Module]) -> type[ConvertedNetwork]:
    """The class of converted networks whose static class is `static`."""
    if static in _CLASSES:
        return _CLASSES[static]
    mixin = ConvertedFeatures if issubclass(static, FeatureGetterNet) else ConvertedNetwork
    _CLASSES[static] = made = type(
        f"Dynamic{static.__name__}", (mixin, static), {"static_class": static, "__doc__": static.__doc__}
    )
    return made


def _rebuild(static: type[nn.Module]) -> nn.Module:
    cls = converted_class(static)
    return cls.__new__(cls)
