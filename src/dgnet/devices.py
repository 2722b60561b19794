"""The devices of this machine, and what `--device`, `--accelerator` and `--devices` mean here."""

from __future__ import annotations

import re

from dgnet.errors import UsageError, check_choice, reason

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
"""Values of `--accelerator`: what training is tested on, or works like it."""


def count_devices() -> dict[str, int]:
    """How many devices of each kind PyTorch can use here; "cpu" comes first."""
    import torch

    return {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}


def list_devices() -> list[str]:
    """The devices of this machine as PyTorch names them: cpu, cuda:0, …"""
    counts = count_devices()
    return ["cpu", *(f"cuda:{index}" for index in range(counts["cuda"])), *["mps"] * counts["mps"]]


def find_device(name: str) -> str:
    """The device for the value of `--device`. Raises UsageError if it cannot be used."""
    import torch

    known = list_devices()
    if name == "auto":
        return "cuda" if "cuda:0" in known else "cpu"
    if name not in known and not (name == "cuda" and "cuda:0" in known):
        raise UsageError(f"--device {name!r} is not on this machine, which has: {', '.join(known)}; auto chooses one")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used on this machine: {reason(error)}") from None
    return name


def choose_devices(accelerator: str, devices: str) -> tuple[str, int | list[int]]:
    """The kind of device to train on, "cpu", "cuda" or "mps", and how many of them, or which (their indices).

    `accelerator`, `devices`: the values of the options. Raises UsageError for devices that this machine does not have.
    """
    check_choice("--accelerator", accelerator, ACCELERATORS)
    counts = count_devices()
    usable = [kind for kind in ("cuda", "mps", "cpu") if counts[kind]]
    kind = {"auto": usable[0], "gpu": "mps" if usable[0] == "mps" else "cuda"}.get(accelerator, accelerator)
    has = f"this machine has: {', '.join(list_devices())}"
    if not counts[kind]:
        raise UsageError(f"--accelerator {accelerator} cannot be used here: {has}")
    if devices == "auto":
        return kind, counts[kind]
    indices = [int(text) for text in devices.split(",") if text] if re.fullmatch(r"\d{1,6}(,\d{1,6})*,?", devices) else []
    if "," in devices and indices:
        if kind != "cuda" or len(set(indices)) < len(indices) or max(indices) >= counts[kind]:
            raise UsageError(f"--devices {devices} are not different GPUs of this machine; {has}")
        return kind, indices
    if not indices or not indices[0]:
        raise UsageError(f"--devices must be a number from 1 on, auto, or indices of GPUs such as 0,2; got {devices!r}")
    if kind != "cpu" and indices[0] > counts[kind]:  # a CPU runs any number of processes
        raise UsageError(f"--devices {devices} are more than there are; {has}")
    return kind, indices[0]
