"""Which kernels `dgnet::aggregate` runs on a device, where the compiler of PyTorch is not at work, and why."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dgnet._extension import Extension
from dgnet.compat.torch import has_kernel
from dgnet.errors import UsageError, check_choice

SWITCH = "DGNET_AGGREGATE"
"""The environment variable that chooses: one of CHOICES. It is read once in a process for each type of device."""

CHOICES = ("auto", "plain", "triton")


EXTENSION = Extension(
    name="dgnet-aggregate",
    what="aggregation",
    duration="a quarter of a minute",
    sources=(Path(__file__).with_name("aggregate.cpp"),),
    is_defined=lambda: has_kernel("dgnet::aggregate", "CPU"),
)


@dataclass(frozen=True)
class AggregationForm:
    """The kernels of `dgnet::aggregate` on a device: "native" (aggregate.cpp), "triton" or "plain", and why."""

    name: str
    reason: str
    is_failure: bool = False  # whether it is "plain" because the others failed


@cache
def find_aggregation(device_type: str, builds: bool = True) -> AggregationForm:
    """Load the kernels for a type of device, such as "cpu", and say which they are.

    `builds`: whether to build the C++ extension if this machine has not yet.

    Raises UsageError for an unknown value of DGNET_AGGREGATE.
    """
    choice = os.environ.get(SWITCH) or CHOICES[0]
    check_choice(SWITCH, choice, CHOICES)
    if choice == "plain":
        return AggregationForm("plain", f"{SWITCH}=plain")
    if device_type == "cuda":
        return _find_triton(choice)
    if device_type != "cpu":
        return AggregationForm("plain", "the compiled kernels run on CPU and CUDA devices only")
    try:
        library = EXTENSION.load() if builds else EXTENSION.load_built()
    except UsageError as error:
        return AggregationForm("plain", str(error), is_failure=True)
    return (
        AggregationForm("plain", "the extension is not built yet")
        if library is None
        else AggregationForm("native", str(library))
    )


def _find_triton(choice: str) -> AggregationForm:
    if choice != "triton":
        return AggregationForm("plain", f"the Triton kernels have not been timed; {SWITCH}=triton chooses them")
    if find_spec("triton") is None:
        return AggregationForm("plain", "the package triton is not installed", is_failure=True)
    from dgnet.graph._aggregate_triton import register

    register()
    return AggregationForm("triton", f"{SWITCH}=triton")


@cache
def prepare(device_type: str, builds: bool) -> None:
    """`find_aggregation` before the first sum. If compiled kernels fail, a line on stderr says so."""
    form = find_aggregation(device_type, builds)
    if form.is_failure and builds:
        print(
            f"{form.reason}; sums outside torch.compile run in plain PyTorch, which is slower ({SWITCH}=plain asks for that)",
            file=sys.stderr,
        )
