"""The sparse mode on the CPU with a compiled extension, `native.cpp`: when it takes a stage, handing one over, building it."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice
from dgnet.graph import DynamicGraph, FixedWeighting, LearnedWeighting, NodeGates, RoutedWeighting, find_stages
from dgnet.graph._weighting import Router, global_average_pool
from dgnet.inference._sparse import SparseExecutor, set_mode, sum_nothing
from dgnet.models._dynamic import Transform

SOURCE = Path(__file__).with_name("native.cpp")

_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


def use_native(network: nn.Module) -> nn.Module:
    """Set `network` to the sparse mode, in place, its stages with the compiled extension as far as that takes them.

    It takes routed weights (`Router`, average pooling), learned and fixed ones, with or without gates on blocks, in float32.
    Weights, and which modules have hooks, are as they are now: call it again where they change. In plain PyTorch runs a stage
    that has a weighting, router or pool of the user's own, hooks on these, or routers that read activations; so do padded
    batches, autocast, other precisions.

    Raises UsageError where the extension cannot be built.
    """
    load_native()
    set_mode(network, "sparse")
    for stage in find_stages(network):
        if _takes(stage):
            stage._executor = NativeExecutor(stage)
    return network


class NativeExecutor(SparseExecutor):
    """As SparseExecutor, of one stage, with its weightings and gates as constants."""

    def __init__(self, stage: DynamicGraph) -> None:
        topology, weighting, gates = stage.topology, stage.weighting, stage.node_gates
        nodes = range(topology.num_nodes)
        routers: Any = weighting.routers if isinstance(weighting, RoutedWeighting) else {}
        columns: Any = {} if gates is None else gates.columns
        is_routed = isinstance(weighting, RoutedWeighting)
        self.constants = torch.classes.dgnet.Stage(
            [list(topology.senders(j)) for j in nodes],
            list(topology.entry),
            [topology.pinned.get(j) for j in nodes],
            [list(topology.free_receivers(i)) for i in nodes],
            [[] if gates is None else list(gates.receivers(i)) for i in nodes],
            [None if is_routed or j == 0 or j in topology.pinned else _constant(weighting.share(j)) for j in nodes],
            [_constant(routers[str(i)].weight) if str(i) in routers else None for i in nodes],
            [_constant(routers[str(i)].bias) if str(i) in routers else None for i in nodes],
            [_constant(columns[str(i)].weight) if str(i) in columns else None for i in nodes],
            None if weighting.threshold is None else _constant(weighting.threshold),
            None if gates is None else _constant(gates.bias),
            getattr(weighting, "gate_form", "") == "psi",
            getattr(weighting, "inference_weight", "") == "raw",
        )
        steps = [_flatten(block) for block in stage.nodes]
        # A stage of plain blocks is one call; else each block is called as the module that it is.
        self.is_plain = stage.shortcut == "edge" and type(stage.activation) in (nn.ReLU, nn.Identity) and None not in steps
        if self.is_plain:
            for node, block in enumerate(steps, start=1):
                self._add_block(node, block or [])

    def _add_block(self, node: int, steps: list[nn.Module]) -> None:
        for step in steps:
            if isinstance(step, nn.Conv2d):
                options: Any = [list(step.padding), list(step.stride), list(step.dilation), step.groups]
                bias = None if step.bias is None else step.bias.detach()
                self.constants.add_convolution(node, step.weight.detach(), bias, *options)
            else:
                self.constants.add_rectifier(node)

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseExecutor, ()  # a copy is not compiled

    @torch.no_grad()
    def forward(self, stage: DynamicGraph, x: Tensor) -> Tensor:
        if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or stage.area is not None:
            return super().forward(stage, x)
        topology, gates = stage.topology, stage.node_gates
        rectifies = stage.shortcut == "edge" and type(stage.activation) is nn.ReLU
        offset = float(getattr(stage.weighting, "offset", 0.0))
        least_logit = -math.inf if gates is None else gates.least_logit
        walk = torch.classes.dgnet.Walk(self.constants, x, stage.find_imposed(x), offset, least_logit)
        feature = stage.input(x)
        summed = walk.run(feature, rectifies) if self.is_plain else self._run_blocks(stage, walk, feature, rectifies)
        if stage._records:
            _record(stage, walk)
        if summed is None:
            return stage.transform(topology.num_nodes - 1, sum_nothing(stage, x))
        return stage.transform(topology.num_nodes - 1, summed, is_activated=rectifies)

    def _run_blocks(self, stage: DynamicGraph, walk: Any, feature: Tensor, rectifies: bool) -> Tensor | None:
        """x̂ of the output node, block by block; None where nothing reaches it."""
        topology = stage.topology
        last = topology.num_nodes - 1
        walk.put(0, feature)
        for node in range(1, last):
            is_entry = node in topology.entry
            summed = walk.take(node, rectifies and not is_entry)
            if summed is None or len(summed) == 0:
                continue
            if is_entry:
                feature = stage.finish_entry(stage.nodes[node - 1](summed), partial(walk.take_shortcut, node))
            else:
                feature = stage.transform(node, summed, is_activated=rectifies)
            walk.put(node, feature)
        output: Tensor | None = walk.take(last, rectifies)
        return output


def _record(stage: DynamicGraph, walk: Any) -> None:
    alpha, weights, ran = walk.alpha(), walk.weights(), walk.ran()
    rows = [(node, list(stage.topology.senders(node))) for node in range(1, stage.topology.num_nodes)]
    for record in stage._records:
        record.append(
            stage,
            [alpha[:, node, senders] for node, senders in rows],
            [weights[:, node, senders] for node, senders in rows],
            list(ran[:, :-1].unbind(1)),
        )


def _flatten(block: nn.Module) -> list[nn.Module] | None:
    """The convolutions and rectifiers that a block is a sequence of; None where it is more than that."""
    if _has_hooks(block):
        return None
    if type(block) in (nn.Sequential, Transform):
        parts = [_flatten(child) for child in block.children()]
        return None if None in parts else [step for part in parts for step in part or []]
    if type(block) is nn.Identity:
        return []
    is_plain = type(block) is nn.Conv2d and block.padding_mode == "zeros" and not isinstance(block.padding, str)
    return [block] if is_plain or type(block) is nn.ReLU else None


def _has_hooks(module: nn.Module) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


def _takes(stage: DynamicGraph) -> bool:
    """Whether the extension knows everything that the stage has."""
    weighting, gates = stage.weighting, stage.node_gates
    if type(weighting) not in (RoutedWeighting, LearnedWeighting, FixedWeighting) or type(gates) not in (NodeGates, type(None)):
        return False
    if any(_has_hooks(module) for module in (weighting, stage.activation, gates) if module is not None):
        return False
    if any(parameter.dtype != torch.float32 or not parameter.is_cpu for parameter in stage.parameters()):
        return False
    if (weighting.reads_features or gates is not None) and stage.router_reads != "feature":
        return False
    return not isinstance(weighting, RoutedWeighting) or (
        weighting.pool is global_average_pool
        and all(type(router) is Router and router.bias is not None for router in weighting.routers.values())
    )


def _constant(values: Tensor) -> Tensor:
    return values.detach().clone(memory_format=torch.contiguous_format)


@cache
def load_native() -> None:
    """Build the extension if this machine has not yet, and load it; `torch.classes.dgnet` is there afterwards.

    It is kept in TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions.

    Raises UsageError where there is no C++ compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in ("g++", "clang++") if shutil.which(name)][:1]
    if not compiler:
        raise UsageError("the compiled sparse mode needs a C++ compiler: install g++, or name one in CXX")
    command = [*compiler, "-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp"]
    command += _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", str(SOURCE)]
    installed = Path(torch.__file__).parent
    command += [f"-I{installed / 'include'}", f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10"]
    key = hashlib.sha256("\0".join([torch.__version__, *command, SOURCE.read_text(encoding="utf-8")]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    library = folder / f"dgnet-{key}.so"
    if not library.exists():
        print(f"compiling the sparse mode, once on this machine: about half a minute ({library})", file=sys.stderr)
        _build(command, library)
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built against other system libraries, in a home that machines share
        raise UsageError(f"{library} cannot be loaded: {error}; remove it, it is built anew") from error


def _build(command: list[str], library: Path) -> None:
    """Write `library` whole or not at all: other processes may be loading it."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
            built.replace(library)
    except OSError as error:
        raise UsageError(f"the compiled sparse mode cannot be built: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        message = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit status {error.returncode}")
        raise UsageError(f"the compiled sparse mode cannot be built: {message}") from error


EXECUTORS = ("recommended", "plain", "native")


def set_sparse(network: nn.Module, executor: str = "recommended") -> nn.Module:
    """Set `network` to the sparse mode, in place, with an executor; returns the network.

    "plain": in plain PyTorch, on any device. "native": with the compiled extension, for a CPU; see `use_native`.
    "recommended": what is fastest where the network is, native on a CPU and plain elsewhere. If the extension cannot be built,
    a line on stderr says why, and the plain one is used.

    Raises UsageError for an unknown executor, for a network without dynamic stages, and where "native" cannot be had.
    """
    check_choice("executor", executor, EXECUTORS)
    is_cpu = next(network.parameters()).is_cpu
    if executor == "native" and not is_cpu:
        raise UsageError("executor 'native' runs on a CPU only; use 'plain' on other devices")
    set_mode(network, "sparse")
    if executor == "plain" or not is_cpu:
        return network
    try:
        return use_native(network)
    except UsageError as error:
        if executor == "native":
            raise
        print(f"{error}; the plain executor is used, which is slower", file=sys.stderr)
        return network
