"""What is installed here: versions, devices, the forms of aggregation and of the sparse mode, and the extras."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dgnet._extras import EXTRAS, find_missing
from dgnet.bench import describe_hardware, versions
from dgnet.devices import list_devices
from dgnet.graph import AggregationForm, find_aggregation
from dgnet.inference import Executor, find_executor


@dataclass(frozen=True)
class Installation:
    """An installation of dgnet, as it works on one device."""

    folder: str  # of the package
    versions: dict[str, str]
    hardware: str
    devices: list[str]  # that PyTorch can use here
    device: str
    aggregation: AggregationForm  # the kernels of sums on the device, outside torch.compile
    sparse_mode: Executor  # what runs the sparse mode on the device
    missing: dict[str, list[str]]  # for each extra the packages that are not installed


def examine(device: str) -> Installation:
    """Look at this installation, and build the C++ extensions if the device can use them."""
    return Installation(
        folder=str(Path(__file__).parent),
        versions=versions(device),
        hardware=describe_hardware(device),
        devices=list_devices(),
        device=device,
        aggregation=find_aggregation(torch.device(device).type),
        sparse_mode=find_executor(device),
        missing={extra: find_missing(extra) for extra in EXTRAS},
    )


def format_installation(found: Installation) -> str:
    """The installation in a few lines."""
    others = ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != "dgnet")
    kernels = {"native": "compiled extension", "triton": "Triton", "plain": "plain PyTorch"}[found.aggregation.name]
    executor = {"native": "compiled extension", "plain": "plain PyTorch, which is slower on a CPU"}[found.sparse_mode.name]
    lines = [
        f"dgnet {found.versions['dgnet']} ({others}) in {found.folder}",
        f"hardware: {found.hardware}",
        f"device: {found.device} (this machine has: {', '.join(found.devices)})",
        f"aggregation outside torch.compile: {kernels}: {found.aggregation.reason}",
        f"sparse mode: {executor}: {found.sparse_mode.reason}",
        f"extras: {', '.join(extra for extra, missing in found.missing.items() if not missing) or 'none'}",
    ]
    for extra, missing in found.missing.items():
        if missing:
            lines.append(f"extra {extra} is not installed ({', '.join(missing)}): pip install 'dgnet[{extra}]'")
    return "\n".join(lines)
