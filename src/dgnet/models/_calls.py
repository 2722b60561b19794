"""One traced forward pass: how each module of a network is called, and who reads what it puts out. Letters: B batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgnet.compat.torch import count_writes, find_tensors
from dgnet.errors import UsageError, reason
from dgnet.graph import Further

BATCH = 3
"""Images in the traced pass. The first size of a run's feature must be this number."""

# Operations whose result still is the shortcut of a residual block: its input in another shape, format or scale.
_KEEPING = {
    *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "to", "float", "clone"),
    *("mul", "__mul__", "__rmul__"),
}
_ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass
class Call:
    """One call of a module.

    `input`: the first argument, if it is a tensor; `further`: the others. `versions`: how often each tensor among them was
    written before. `readers`: the modules that were running when an operation read the output. `is_residual`: whether the input
    was added to something inside; `is_written`: whether an argument was changed in place.
    """

    name: str
    order: int
    input: Tensor | None
    further: Further
    output: Any = None
    versions: list[int] = field(default_factory=list)
    readers: set[str] = field(default_factory=set)
    is_residual: bool = False
    is_written: bool = False


class _Trace(TorchFunctionMode):
    """The calls of all modules in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []  # in the order in which they ended
        self.open: list[Call] = []  # the innermost last
        self.written: dict[int, list[Call]] = {}  # by the id of an output
        self.shortcuts: dict[int, set[int]] = {}  # by the id of a tensor: ids of the inputs of calls that it is a view of
        self.kept: list[Any] = []  # Python may reuse the id of a freed tensor

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        further = drop_missing(args[1:] if args else (), kwargs)
        self.open.append(Call(name, 0, first, further, versions=_count_writes(first, further)))

    def leave(self, output: Any) -> None:
        """The module that was called last returns."""
        call = self.open.pop()
        call.order, call.output = len(self.calls), output
        call.is_written = _count_writes(call.input, call.further) != call.versions
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


def trace_calls(network: nn.Module, in_chans: int, image_size: tuple[int, int]) -> list[Call]:
    """The calls of all modules in one forward pass of a copy of `network`, in the order in which they ended.

    It runs on the meta device, or on the CPU if the network cannot. Raises UsageError if it does not take images of this size.
    """
    size = (BATCH, in_chans, *image_size)
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


def _run(network: nn.Module, images: Tensor) -> list[Call]:
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
    return trace.calls


def drop_missing(values: Sequence[Any], named: Mapping[str, Any]) -> Further:
    """Arguments without those that are None, at the end or by name."""
    values = tuple(values)
    while values and values[-1] is None:
        values = values[:-1]
    return Further(values, {name: value for name, value in named.items() if value is not None})
