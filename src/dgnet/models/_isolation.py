"""Run a network without leaving a trace: copies without the user's hooks, modes of modules, random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from dgnet.compat.torch import hook_tables, is_compiled
from dgnet.errors import UsageError, reason


def copy_network(network: nn.Module) -> nn.Module:
    """A copy of `network`. Raises UsageError for a compiled network, and for one that cannot be copied."""
    if is_compiled(network):
        raise UsageError("the network is compiled; use it before torch.compile (network._orig_mod), and compile the result")
    try:
        return deepcopy(network)
    except Exception as error:  # a module may raise anything
        raise UsageError(
            f"{type(network).__name__} cannot be copied ({type(error).__name__}: {reason(error)}); set features that it keeps"
            " from its last pass to None, and remove pruning and old weight normalisation (torch.nn.utils) first"
        ) from error


def copy_for_passes(network: nn.Module) -> nn.Module:
    """A copy to run, without the user's hooks, which must not be called. Those of torch and timm stay: they compute."""
    copied = copy_network(network)
    for module in copied.modules():
        for table in hook_tables(module):
            for key, hook in list(table.items()):
                if not _is_of_library(hook):
                    del table[key]
    return copied


def _is_of_library(hook: Any) -> bool:
    function = hook
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0] in ("torch", "timm")


def find_dtype(network: nn.Module) -> torch.dtype:
    """The precision of the images that `network` takes: that of its first parameter or buffer of a floating type."""
    tensors = chain(network.parameters(), network.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def find_device(network: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU without one."""
    return next((tensor.device for tensor in chain(network.parameters(), network.buffers())), torch.device("cpu"))


@contextmanager
def keep_modes(network: nn.Module) -> Iterator[None]:
    """After the `with` block each module is in training or evaluation mode as before, which may not be the same for all."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def plain_context(network: nn.Module) -> Iterator[None]:
    """Without what the caller may have set around: inference mode, autocast, another default device."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))  # it slows every operation down
        for kind in {"cpu", find_device(network).type} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def seeded(network: nn.Module, seed: int = 0) -> Iterator[None]:
    """Inside the `with` block random numbers are always the same; afterwards all generators are as before."""
    python, numpy, device = random.getstate(), np.random.get_state(), find_device(network)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def count_python_draws() -> Any:
    """A value that changes if Python or NumPy draws a random number."""
    return random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]
