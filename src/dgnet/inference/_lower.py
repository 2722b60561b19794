"""Blocks as lists of operations that the compiled extension computes (`program.h`).

A block is traced with torch.fx. Each step becomes an `Operation` on registers, which hold maps of shape (B, C, H, W); then
operations that follow a convolution are merged into it. A block with any other step is not lowered.

Letters: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
from torch import Tensor, fx, nn

from dgnet.compat.torch import has_forward_hooks
from dgnet.models import keep_modes


@dataclass(frozen=True)
class Activation:
    """A function of each element, by the extension's name. `first`, `second`: bounds of a clamp, or a leaky ReLU's slope."""

    name: str = "none"
    first: float = 0.0
    second: float = 0.0


@dataclass
class Operation:
    """One step of a block: register `out` from the registers `inputs` (-1: none).

    `kind` "convolve": x, added, subtracted; "combine": act(x + added) - subtracted; "affine": act(x · weight + bias) of each
    channel; "normalize": layer normalisation of the channels of each position; "average": (B, C, 1, 1); "scale": x · factors,
    (B, C, 1, 1).
    """

    kind: str
    out: int
    inputs: list[int]
    activation: Activation = Activation()
    weight: Tensor | None = None
    bias: Tensor | None = None
    geometry: list[int] = field(default_factory=list)  # of a convolution: stride, padding, dilation, each twice; groups
    pads_same: bool = False
    epsilon: float = 0.0


def lower(block: nn.Module, layout: str = "NCHW") -> Any | None:
    """`block` as a `torch.classes.dgnet.Program`; None if it has a step of another kind.

    `layout`: of what the block reads and writes; the program's maps are (B, C, H, W) in any case.
    """
    operations = find_operations(block, layout)
    return None if operations is None else write_program(operations)


def write_program(operations: list[Operation]) -> Any:
    """The operations as a `torch.classes.dgnet.Program`, which holds copies of their weights."""
    program = torch.classes.dgnet.Program()
    for one in operations:
        act = (one.activation.name, one.activation.first, one.activation.second)
        weight, bias = (None if values is None else values.detach().float().contiguous() for values in (one.weight, one.bias))
        if one.kind == "convolve":
            program.add_convolution(one.out, one.inputs, weight, bias, one.geometry, one.pads_same, *act)
        elif one.kind == "combine":
            program.add_combination(one.out, one.inputs, *act)
        elif one.kind == "affine":
            program.add_affine(one.out, one.inputs[0], weight, bias, *act)
        elif one.kind == "normalize":
            program.add_normalization(one.out, one.inputs[0], weight, bias, one.epsilon)
        elif one.kind == "average":
            program.add_average(one.out, one.inputs[0])
        else:
            program.add_scaling(one.out, *one.inputs)
    return program


def find_operations(block: nn.Module, layout: str = "NCHW") -> list[Operation] | None:
    """The operations of `block` in evaluation mode; None if it has a step that the extension does not know.

    Also None if a part has hooks or a forward pass of its own, or stays in training mode in a block in evaluation mode.
    """
    parts = list(block.modules())
    if has_forward_hooks(block) or any("forward" in vars(part) for part in parts) or layout not in ("NCHW", "NHWC"):
        return None
    if not block.training and any(part.training for part in parts):
        return None
    whole = nn.Sequential(block)  # calls the block with one argument
    with keep_modes(block):
        whole.eval()
        try:
            graph = _Tracer().trace(whole)
            translation = _Translation(whole, layout)
            result = translation.run(graph)
        except Exception:  # a block that cannot be traced raises anything
            return None
    return _merge(translation.operations, result)


class _Tracer(fx.Tracer):
    """Traces into all modules but those that the translation knows."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in _MODULES or (type(module).__module__.startswith("torch.nn") and type(module) not in _CONTAINERS)


_CONTAINERS = (nn.Sequential,)

_LEAST_CHANNELS = 4
"""A convolution that reads fewer channels, such as that of the image, is faster in PyTorch."""


class _UnknownError(Exception):
    """A step that is not translated."""


@dataclass(frozen=True)
class _Map:
    """The value of a step: a register, seen as (B, C, H, W) or, if `is_last`, as (B, H, W, C)."""

    register: int
    is_last: bool = False
    is_pixel: bool = False  # H = W = 1


def _require(condition: bool) -> None:
    if not condition:
        raise _UnknownError


class _Translation:
    """Writes one operation for each step of a traced block; steps on constants are computed."""

    def __init__(self, block: nn.Module, layout: str) -> None:
        self.block, self.is_last = block, layout == "NHWC"
        self.operations: list[Operation] = []
        self.registers = 1
        self.overwritten: list[tuple[int, int]] = []  # by steps in place: the number of operations then, and the register
        self.values: dict[fx.Node, Any] = {}

    def run(self, graph: fx.Graph) -> int:
        """The register of the result. Raises `_UnknownError` if a step is not known."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = _Map(0, self.is_last)
            elif node.op == "output":
                result = self.read(node.args[0])
                _require(isinstance(result, _Map) and result.is_last == self.is_last)
                later = [[register for one in self.operations[at:] for register in one.inputs] for at, _ in self.overwritten]
                _require(not any(value in read for (_, value), read in zip(self.overwritten, later, strict=True)))
                return int(result.register)
            else:
                self.values[node] = self.step(node)
        raise _UnknownError

    def step(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.block)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: self.values[argument])
        if node.op == "call_module":
            module = self.block.get_submodule(str(node.target))
            known = _MODULES.get(type(module))
            _require(known is not None and len(args) == 1 and not kwargs)
            assert known is not None
            written = known(self, args[0], module)
            if getattr(module, "inplace", False):
                self.overwrite(args[0])
            return written
        if not any(isinstance(value, _Map) for value in _flatten([args, kwargs])):  # a constant
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        function = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
        if function is None:
            raise _UnknownError
        written = function(self, *args, **kwargs)
        if node.target in _IN_PLACE or kwargs.get("inplace") or any(value is True for value in args[1:]):
            self.overwrite(args[0])
        return written

    def read(self, argument: Any) -> Any:
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def write(self, kind: str, inputs: list[_Map], **options: Any) -> _Map:
        out = self.registers
        self.registers += 1
        self.operations.append(Operation(kind, out, [value.register for value in inputs], **options))
        return replace(inputs[0], register=out)

    def overwrite(self, value: Any) -> None:
        """Note that a step has computed in place: nothing may read the old value later."""
        _require(isinstance(value, _Map))
        self.overwritten.append((len(self.operations), value.register))


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [part for one in value for part in _flatten(one)]
    return _flatten(list(value.values())) if isinstance(value, dict) else [value]


# Modules.


def _convolution(to: _Translation, x: _Map, conv: nn.Conv2d) -> _Map:
    _require(not x.is_last and conv.padding_mode == "zeros")
    _require(conv.in_channels >= _LEAST_CHANNELS or conv.groups > 1)
    pads_same = type(conv) is Conv2dSame or conv.padding == "same"
    _require(pads_same or not isinstance(conv.padding, str))
    # torch's "same" puts the odd pixel to the right and below, as TensorFlow's does.
    padding = [0, 0] if pads_same else [int(size) for size in conv.padding]
    geometry = [*conv.stride, *padding, *conv.dilation, conv.groups]
    return to.write("convolve", [x], weight=conv.weight, bias=conv.bias, geometry=geometry, pads_same=pads_same)


def _linear(to: _Translation, x: _Map, linear: nn.Linear) -> _Map:
    _require(x.is_last)
    weight = linear.weight[:, :, None, None]
    return to.write("convolve", [x], weight=weight, bias=linear.bias, geometry=[1, 1, 0, 0, 1, 1, 1])


def _batch_norm(to: _Translation, x: _Map, norm: nn.BatchNorm2d) -> _Map:
    _require(not x.is_last and norm.running_mean is not None and norm.running_var is not None)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    return to.write("affine", [x], weight=scale, bias=shift)


def _batch_norm_and_activation(to: _Translation, x: _Map, norm: BatchNormAct2d) -> _Map:
    _require(type(norm.drop) is nn.Identity)
    y = _batch_norm(to, x, norm)
    known = _MODULES.get(type(norm.act))
    _require(known is not None)
    assert known is not None
    activated: _Map = known(to, y, norm.act)
    return activated


def _layer_norm(to: _Translation, x: _Map, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> _Map:
    _require(x.is_last and len(tuple(shape)) == 1)
    (channels,) = shape
    weight = torch.ones(channels) if weight is None else weight
    bias = torch.zeros(channels) if bias is None else bias
    return to.write("normalize", [x], weight=weight, bias=bias, epsilon=eps)


def _activate(name: str, first: float = 0.0, second: float = 0.0) -> Callable[..., _Map]:
    def write(to: _Translation, x: _Map, *module: Any, **options: Any) -> _Map:
        return to.write("combine", [x], activation=Activation(name, first, second))

    return write


def _identity(to: _Translation, x: _Map, *module: Any) -> _Map:
    return x


def _gelu(to: _Translation, x: _Map, approximate: str = "none") -> _Map:
    return to.write("combine", [x], activation=Activation("gelu" if approximate == "none" else "gelu_tanh"))


def _hardtanh(to: _Translation, x: _Map, low: float = -1.0, high: float = 1.0, inplace: bool = False) -> _Map:
    return to.write("combine", [x], activation=Activation("clamp", float(low), float(high)))


def _leaky(to: _Translation, x: _Map, slope: float = 0.01, inplace: bool = False) -> _Map:
    return to.write("combine", [x], activation=Activation("leaky", float(slope)))


_relu = _activate("clamp", 0.0, float("inf"))
_relu6 = _activate("clamp", 0.0, 6.0)

_MODULES: dict[type[nn.Module], Callable[..., _Map]] = {
    nn.Conv2d: _convolution,
    Conv2dSame: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    BatchNormAct2d: _batch_norm_and_activation,
    nn.LayerNorm: lambda to, x, norm: _layer_norm(to, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps),
    nn.Identity: _identity,
    nn.Dropout: _identity,
    nn.Dropout2d: _identity,
    DropPath: _identity,
    nn.ReLU: _relu,
    nn.ReLU6: _relu6,
    nn.Hardtanh: lambda to, x, act: _hardtanh(to, x, act.min_val, act.max_val),
    nn.LeakyReLU: lambda to, x, act: _leaky(to, x, act.negative_slope),
    nn.Hardswish: _activate("hard_swish"),
    nn.Hardsigmoid: _activate("hard_sigmoid"),
    nn.Sigmoid: _activate("sigmoid"),
    nn.SiLU: _activate("silu"),
    nn.Tanh: _activate("tanh"),
    nn.GELU: lambda to, x, act: _gelu(to, x, act.approximate),
}

# Functions and methods.


def _require_alike(x: Any, y: Any) -> None:
    _require(isinstance(x, _Map) and isinstance(y, _Map) and replace(x, register=0) == replace(y, register=0))


def _add(to: _Translation, x: Any, y: Any) -> _Map:
    _require_alike(x, y)
    return to.write("combine", [x, y])


def _subtract(to: _Translation, x: Any, y: Any) -> _Map:
    _require_alike(x, y)
    written = to.write("combine", [x])
    to.operations[-1].inputs = [x.register, -1, y.register]
    return written


def _multiply(to: _Translation, x: Any, y: Any) -> _Map:
    """With a constant of each channel, or with a factor for each sample and channel."""
    if isinstance(y, _Map) and isinstance(x, _Map):
        x, y = (y, x) if x.is_pixel else (x, y)
        _require(y.is_pixel and not x.is_pixel and x.is_last == y.is_last)
        return to.write("scale", [x, y])
    if not isinstance(x, _Map):
        x, y = y, x
    if isinstance(y, Tensor):
        shape = tuple(y.shape)
        along = shape[-1:] if x.is_last else shape[-3:-2]
        _require(y.numel() > 1 and bool(along) and along[0] == y.numel() and not y.is_complex())
        return to.write("affine", [x], weight=y.flatten(), bias=torch.zeros(y.numel()))
    raise _UnknownError


def _permute(to: _Translation, x: _Map, *axes: Any) -> _Map:
    order = tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], list | tuple) else axes
    _require(order == ((0, 3, 1, 2) if x.is_last else (0, 2, 3, 1)))
    return replace(x, is_last=not x.is_last)


def _mean(to: _Translation, x: _Map, dim: Any = None, keepdim: bool = False) -> _Map:
    _require(keepdim and not x.is_last and tuple(dim) in ((2, 3), (-2, -1)))
    return replace(to.write("average", [x]), is_pixel=True)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _add,
    operator.iadd: _add,
    operator.sub: _subtract,
    operator.mul: _multiply,
    operator.imul: _multiply,
    torch.mul: _multiply,
    torch.add: _add,
    torch.permute: _permute,
    torch.sigmoid: _activate("sigmoid"),
    torch.tanh: _activate("tanh"),
    torch.relu: _relu,
    F.relu: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.leaky_relu: _leaky,
    F.hardswish: _activate("hard_swish"),
    F.hardsigmoid: _activate("hard_sigmoid"),
    F.silu: _activate("silu"),
    F.sigmoid: _activate("sigmoid"),
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
}

_METHODS: dict[Any, Callable[..., Any]] = {
    "add": _add,
    "add_": _add,
    "sub": _subtract,
    "mul": _multiply,
    "mul_": _multiply,
    "permute": _permute,
    "mean": _mean,
    "contiguous": _identity,
    "sigmoid": _activate("sigmoid"),
    "sigmoid_": _activate("sigmoid"),
    "tanh": _activate("tanh"),
    "relu": _relu,
    "relu_": _relu,
}

_IN_PLACE = (operator.iadd, operator.imul, "add_", "mul_", "sigmoid_", "relu_")


# Merging.


def _merge(operations: list[Operation], result: int) -> list[Operation]:
    """Fewer operations with the same result: what follows a convolution becomes a part of it.

    A sum x + y from which x is subtracted again is y; only rounding differs.
    """
    merged: list[Operation] = []
    renamed: dict[int, int] = {}
    reads = Counter(register for one in operations for register in one.inputs if register >= 0)
    reads[result] += 1
    for one in operations:
        one = replace(one, inputs=[renamed.get(register, register) for register in one.inputs])
        forms = [one]
        if one.kind == "combine" and len(one.inputs) == 2:  # a sum has no order
            forms.append(replace(one, inputs=one.inputs[::-1]))
        for form in forms:
            last = next((before for before in merged if before.out == form.inputs[0] and reads[before.out] == 1), None)
            if last is None or not _absorb(last, form):
                continue
            merged.remove(last)  # what it reads now may have been written after it
            is_empty = last.kind == "combine" and last.inputs[1:] == [-1, -1] and last.activation.name == "none"
            kept = last.inputs[0] if is_empty else last.out
            if not is_empty:
                merged.append(last)
            renamed[one.out] = kept
            reads[kept] += reads[one.out] - 1
            break
        else:
            merged.append(one)
    result = renamed.get(result, result)
    if result == 0:
        return []
    last = next(one for one in merged if one.out == result)  # the last operation gives the result
    merged.remove(last)
    return [*merged, last]


def _absorb(last: Operation, one: Operation) -> bool:
    """Whether `one`, which alone reads `last`, becomes a part of it; then `last` is changed."""
    added, subtracted = ([*last.inputs[1:], -1, -1])[:2]
    if subtracted >= 0 or last.kind not in ("convolve", "combine", "affine", "normalize"):
        return False
    is_open = last.activation.name == "none"
    if one.kind == "affine":  # of the convolution's own weights
        if last.kind != "convolve" or not is_open or added >= 0:
            return False
        assert last.weight is not None
        assert one.weight is not None
        assert one.bias is not None
        scale = one.weight.double()
        last.weight = last.weight.double() * scale[:, None, None, None]
        last.bias = one.bias.double() if last.bias is None else last.bias.double() * scale + one.bias.double()
        last.activation = one.activation
        return True
    if one.kind != "combine":
        return False
    new_added, new_subtracted = ([*one.inputs[1:], -1, -1])[:2]
    takes_maps = last.kind in ("convolve", "combine")
    if (new_added >= 0 or new_subtracted >= 0) and not takes_maps:
        return False
    if new_added < 0 and new_subtracted >= 0 and one.activation.name == "none" and is_open:
        if new_subtracted == added:
            last.inputs = [last.inputs[0], -1, -1]
            return True
        if last.kind == "combine" and added >= 0 and new_subtracted == last.inputs[0]:
            last.inputs = [added, -1, -1]
            return True
    if new_added >= 0 and (added >= 0 or not is_open):
        return False
    if one.activation.name != "none" and not is_open:
        return False
    if last.kind == "normalize" and one.activation.name != "none":
        return False
    inputs = [last.inputs[0], new_added if new_added >= 0 else added, new_subtracted]
    last.inputs = inputs if takes_maps else last.inputs
    last.activation = one.activation if one.activation.name != "none" else last.activation
    return True
