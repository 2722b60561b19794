"""Hardware and versions, which are reported with every measured figure."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import dgnet
from dgnet.paths import is_file


def describe_hardware(device: str) -> str:
    """The CPU or GPU in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if is_file(cpuinfo):
        lines = dict(
            line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if ":" in line
        )
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        name = lines.get("model name", name)
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        flags = ", ".join(flag.upper() for flag in wanted if flag in lines.get("flags", "").split())
    return f"{name}, {torch.get_num_threads()} threads" + (f", {flags}" if flags else "")


def versions(device: str) -> dict[str, str]:
    """The versions of the packages that affect speed."""
    import timm
    import torchvision

    found = {"dgnet": dgnet.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {"torchvision": torchvision.__version__, "timm": timm.__version__}
    return found | ({"cuda": torch.version.cuda} if device.startswith("cuda") and torch.version.cuda else {})
