"""Private names of torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule, source
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not listed
from torch.profiler import ProfilerActivity, kineto_available, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

DYNAMO_READS_CONTEXT_VARS: bool = hasattr(source, "ContextVarGetSource")
"""Whether `torch.compile` can trace `ContextVar.get`: it cannot in torch 2.11, and can in 2.14. There is no public test."""

UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: lambda matrix, vector, **_: 2 * prod(matrix),
    torch.ops.aten.dot: lambda left, right, **_: 2 * prod(left),
    torch.ops.aten.addmv: lambda added, matrix, vector, **_: 2 * prod(matrix),
    torch.ops.aten.addbmm: lambda added, left, right, **_: 2 * prod(left) * right[-1],
    torch.ops.aten._trilinear: lambda left, weight, right, *_, **__: 2 * left[0] * prod(weight),  # nn.Bilinear
    # On the CPU; on the meta device they run as several operators.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten.mkldnn_rnn_layer: lambda x, read, kept, *_, **__: 2 * prod(x[:-1]) * (prod(read) + prod(kept)),
}
"""Matrix products that torch's `FlopCounterMode` does not know: operator -> its operations (two for each multiply-add), from
the shapes of its operands. Some have private names."""


def current_backward() -> int:
    """The number of the backward pass that this thread is in, -1 if it is in none. There is no public function."""
    return torch._C._current_graph_task_id()


def is_in_backward() -> bool:
    """Whether this thread is in a backward pass, which may compute a checkpointed node again."""
    return current_backward() != -1


def will_run(node: Any) -> bool:
    """Whether the backward pass that this thread is in will run a node of autograd's graph."""
    return bool(torch._C._will_engine_execute_node(node))


_BATCH_NORMS = {"NativeBatchNormBackward0": "_saved_eps", "CudnnBatchNormBackward0": "_saved_epsilon"}
"""Batch normalisations in autograd's graph, and the name under which each keeps ε."""


class BatchNorm(NamedTuple):
    """A batch normalisation as it was computed: scale · input + shift, with one scale and one shift for each channel.

    `input`: (B, C, H, W), that which autograd keeps; `scale` and `shift`: (C,), in float32 or float64.
    """

    input: Tensor
    scale: Tensor
    shift: Tensor


def find_batch_norm(x: Tensor) -> BatchNorm | None:
    """The batch normalisation whose output is `x`, without gradients; None if `x` is no such output.

    Also None where autograd does not keep what is needed in its usual form: with frozen or sharded parameters, statistics in
    half precision, and saved tensors that somebody's hooks keep, as those of gradient checkpointing do.
    """
    node: Any = x.grad_fn
    if node is None or node.name() not in _BATCH_NORMS or x._version or x.is_meta or not x.numel():
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    parameters = [getattr(edge, "variable", None) for edge, _ in node.next_functions[1:3]]
    if any(one is None or one.untyped_storage().size() < one.nbytes for one in parameters):
        return None
    try:
        if node._raw_saved_input.unpack_hook is not None:  # asked first: reading such a tensor could run the network again
            return None
        read = node._saved_input.detach()  # shares the counter of changes in place
        if node._saved_training:
            mean, inverse = node._saved_result1, node._saved_result2  # the second: 1 / sqrt(variance + ε)
        else:
            mean, variance = node._saved_running_mean, node._saved_running_var
            inverse = (variance + getattr(node, _BATCH_NORMS[node.name()])).rsqrt()
    except RuntimeError:  # the graph was used already
        return None
    if mean.dtype.itemsize < 4:
        return None
    weight, bias = (one.detach() for one in parameters if one is not None)
    scale = inverse * weight
    return BatchNorm(read, scale, bias - mean * scale)


def is_transformed(x: Tensor) -> bool:
    """Whether Python cannot read the values of `x`, or only those of an example, although the compiler is not at work.

    This is so under `torch.jit.trace` and the exporters that use it, the transforms of `torch.func`, forward-mode derivatives
    and `make_fx`, and for fake tensors. There is no public test for all of them.
    """
    return (
        is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or get_proxy_mode() is not None
        or isinstance(x, FakeTensor)
    )


def is_batched(x: Tensor) -> bool:
    """Whether `x` stands for many tensors, as under `vmap`, or as a gradient of `is_grads_batched`. There is no public test."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_compiled_for_all_sizes() -> bool:
    """Whether `torch.compile` is at work with `dynamic=True`. There is no public test."""
    return not (torch.compiler.is_exporting() or torch._dynamo.config.assume_static_by_default)


def allow_many_graphs() -> Any:
    """A context in which any number of networks of one class may be compiled. By default the ninth in a process is an error."""
    return torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)


def freeze_weights() -> Any:
    """A context in which `torch.compile` takes weights for constants: it packs them, and folds normalisations into them.

    The tracer reads the setting too, so it has no effect among the `options` of `torch.compile`.
    """
    from torch._inductor import config  # here: it takes long to import

    return config.patch(freezing=True)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether `module` or a part of it has forward hooks. The public interface can register hooks, but not list them."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """The forward hooks of `module`, those before and after it; see `has_forward_hooks`."""
    return [module._forward_pre_hooks, module._forward_hooks]


def has_any_hooks(module: nn.Module) -> bool:
    """Whether `module` itself has hooks of any kind, of the forward or the backward pass."""
    tables = (*hook_tables(module), module._backward_hooks, module._backward_pre_hooks)
    return any(tables)


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile` returns."""
    return isinstance(module, OptimizedModule)


def message_from_worker(error: type[Exception], text: str) -> str:
    """The message of an exception from a DataLoader worker. `text`: the text with which torch raises it again.

    Only the class of the exception and this text leave the worker: "Caught ERROR in …", the traceback, and at its end the
    message. Any other `text` is returned as it is.
    """
    line = f"\n{error.__module__}.{error.__qualname__}: "
    return text.rpartition(line)[2] if text.startswith(f"Caught {error.__name__} in ") else text


def find_tensors(values: object) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in find_leaves(values) if isinstance(leaf, Tensor)]


def find_leaves(values: object) -> list[object]:
    """What nested containers (tuples, lists, dicts) hold."""
    return list(tree_leaves(values))


def count_writes(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version


def list_allocations(step: Callable[[], object]) -> list[int] | None:
    """Bytes that a call of `step` takes from torch's CPU allocator, in order; negative: given back.

    None if this build of torch has no profiler. The public lists of the profiler's events lack most of them.
    """
    if not kineto_available():
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read once; otherwise the profiler writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def has_kernel(operator: str, key: str) -> bool:
    """Whether a kernel of `operator` is registered for the dispatch key `key` itself, such as "CPU"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
