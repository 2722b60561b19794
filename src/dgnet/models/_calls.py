"""Traced forward passes: how each module of a network is called, and who reads what it puts out. Letters: B batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from dgnet.compat.torch import count_writes, find_tensors
from dgnet.errors import UsageError, reason
from dgnet.graph import Further
from dgnet.models._isolation import copy_for_passes, count_python_draws, find_dtype, plain_context, seeded

_BATCH = 3
"""Images in the traced pass in evaluation mode."""
_TRAINING_BATCH = 2
"""Images in traced passes in training mode. Another number: what has one part for each image changes its size."""
_DRAWS = 6
"""Further passes in training mode, if the network draws random numbers to decide what it calls."""

# Operations whose result still is the shortcut of a residual block: its input in another shape, format or scale.
_KEEPING = {
    *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "to", "float", "clone"),
    *("mul", "__mul__", "__rmul__"),
}
_DRAWING = {"rand", "rand_like"}
_ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass
class Call:
    """One call of a module.

    `batch`: images of the pass. `input`: the first argument, if it is a tensor; `further`: the others. `versions`: how often
    each tensor among them was written before; `output_version`: the same of the output. `readers`: the modules that were
    called with the output, or were running when an operation read it; "": the network itself, which also reads what it returns
    and what it keeps in an attribute. `is_residual`: whether the input was added to something inside; `is_written`: whether an
    argument was changed in place.
    """

    name: str
    batch: int
    order: int
    input: Tensor | None
    further: Further
    output: Any = None
    versions: list[int] = field(default_factory=list)
    output_version: int = 0
    readers: set[str] = field(default_factory=set)
    is_residual: bool = False
    is_written: bool = False


def group_by_name(calls: Sequence[Call]) -> dict[str, list[Call]]:
    """The calls of each module, in order."""
    grouped: dict[str, list[Call]] = {}
    for call in calls:
        grouped.setdefault(call.name, []).append(call)
    return grouped


def is_inside(name: str, module: str) -> bool:
    """Whether `name` is that of a module or of a part of it."""
    return name == module or name.startswith(f"{module}.")


class _Trace(TorchFunctionMode):
    """The calls of all modules in one forward pass."""

    def __init__(self, batch: int, scalar_draw: float | None = None) -> None:
        """`scalar_draw`: what a random number between 0 and 1 that is drawn alone becomes; None: as it is drawn."""
        super().__init__()
        self.batch, self.scalar_draw = batch, scalar_draw
        self.has_drawn = False  # a number alone, as for a decision, or one of Python's
        self.calls: list[Call] = []  # in the order in which they ended
        self.open: list[Call] = []  # the innermost last
        self.written: dict[int, list[Call]] = {}  # by the id of an output
        self.shortcuts: dict[int, set[int]] = {}  # by the id of a tensor: ids of the inputs of calls that it is a view of
        self.kept: list[Any] = []  # Python may reuse the id of a freed tensor

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        further = drop_missing(args[1:] if args else (), kwargs)
        self.read(find_tensors((args, kwargs)), name)
        self.open.append(Call(name, self.batch, 0, first, further, versions=_count_writes(first, further)))

    def leave(self, output: Any) -> None:
        """The module that was called last returns."""
        call = self.open.pop()
        call.order, call.output = len(self.calls), output
        call.is_written = _count_writes(call.input, call.further) != call.versions
        self.calls.append(call)
        if isinstance(output, Tensor):
            call.output_version = count_writes(output)
            self.written.setdefault(id(output), []).append(call)

    def read(self, tensors: Sequence[Tensor], reader: str) -> None:
        """Note that `reader` reads these tensors, some of which may be outputs of modules."""
        for tensor in tensors:
            for call in self.written.get(id(tensor), ()):
                call.readers.add(reader)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # On the meta device a normalisation of a batch is many small steps in Python.
        is_norm = func is batch_norm and args[0].is_meta
        result = torch.empty_like(args[0]) if is_norm else func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _DRAWING and isinstance(result, Tensor) and result.numel() == 1:
            self.has_drawn = True
            if self.scalar_draw is not None:
                result = torch.full_like(result, self.scalar_draw)
        self.kept.append((args, kwargs, result))
        if not find_tensors(result):
            return result  # such as `x.shape`, which reads no values
        read = find_tensors((args, kwargs))
        self.read(read, self.open[-1].name if self.open else "")
        if name not in _KEEPING and name not in _ADDING:
            return result
        origins = set().union(*({id(tensor)} | self.shortcuts.get(id(tensor), set()) for tensor in read))
        if name in _KEEPING:
            self.shortcuts.setdefault(id(result), set()).update(origins)
            return result
        for call in self.open:
            call.is_residual |= call.input is not None and id(call.input) in origins
        return result


def _count_writes(*arguments: Any) -> list[int]:
    return [count_writes(tensor) for tensor in find_tensors(arguments)]


def trace_calls(
    network: nn.Module, in_chans: int, image_size: tuple[int, int], verb: str = "converted", trains: bool = True
) -> list[list[Call]]:
    """The calls of all modules in forward passes of a copy of `network`, each in the order in which the calls ended.

    The first pass is in evaluation mode; if `trains`, further ones are in training mode, with another number of images, unless
    the network does not train on images alone. Several, if random numbers decide what is called. They run on the meta device,
    or on the CPU if the network cannot. `verb`: for the message: what the network cannot be.

    Raises UsageError if it does not take images of this size, and if it cannot be copied.
    """
    size = (in_chans, *image_size)
    with plain_context(network):
        copied = copy_for_passes(network)
        try:
            passes = [_run(copied.to("meta"), (_BATCH, *size)).calls]
        except Exception:  # a layer that reads values, or does not take the size: the CPU tells which
            try:
                copied = copy_for_passes(network).to("cpu", torch.float32)
                passes = [_run(copied, (_BATCH, *size)).calls]
            except Exception as error:  # a module may raise anything
                images = "×".join(map(str, (_BATCH, *size)))
                raise UsageError(
                    f"{type(network).__name__} cannot be {verb}: it takes no images of {images} ({type(error).__name__}:"
                    f" {reason(error)}); give another image_size, or set the network's attribute in_chans if images have"
                    " another number of channels"
                ) from error
        if not trains:
            return passes
        try:
            return [*passes, *_run_in_training(copied, size)]
        except Exception:
            pass
        try:  # it may read values in training only
            return [*passes, *_run_in_training(copy_for_passes(network).to("cpu", torch.float32), size)]
        except Exception:
            return passes


def _run_in_training(network: nn.Module, size: Sequence[int]) -> list[list[Call]]:
    first = _run(network, (_TRAINING_BATCH, *size), is_training=True)
    if not first.has_drawn:
        return [first.calls]
    # In the second pass none of the numbers that are drawn alone is small, in the third all are.
    ways = (1 - 1e-6, 0.0, *[None] * (_DRAWS - 2))
    others = [_run(network, (_TRAINING_BATCH, *size), True, way, seed) for seed, way in enumerate(ways, start=1)]
    return [trace.calls for trace in (first, *others)]


def _run(
    network: nn.Module, size: Sequence[int], is_training: bool = False, scalar_draw: float | None = None, seed: int = 0
) -> _Trace:
    trace = _Trace(size[0], scalar_draw)

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        trace.enter(name, args, kwargs)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        trace.leave(output)

    hooks = []
    for name, module in network.named_modules():
        if name and not isinstance(module, nn.Identity):
            hooks.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True))
    device = "meta" if any(tensor.is_meta for tensor in network.state_dict().values() if isinstance(tensor, Tensor)) else "cpu"
    images = torch.randn(tuple(size), generator=torch.Generator().manual_seed(0)).to(device, find_dtype(network))
    with seeded(network, seed), torch.no_grad(), trace:
        before = count_python_draws()
        output = network.train(is_training)(images)
        trace.has_drawn |= count_python_draws() != before
    trace.read(find_tensors(output), "")
    for module in network.modules():
        kept = {name: value for name, value in vars(module).items() if name not in _OWN_ATTRIBUTES}
        trace.read(find_tensors(kept), "")
    for hook in hooks:
        hook.remove()
    return trace


_OWN_ATTRIBUTES = {"_parameters", "_modules", "_buffers"}


def drop_missing(values: Sequence[Any], named: Mapping[str, Any]) -> Further:
    """Arguments without those that are None, at the end or by name."""
    values = tuple(values)
    while values and values[-1] is None:
        values = values[:-1]
    return Further(values, {name: value for name, value in named.items() if value is not None})
