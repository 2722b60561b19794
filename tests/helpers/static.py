"""Small static networks of timm with runs of blocks, to convert: one for each layout and each way to call blocks."""

from __future__ import annotations

import copy
from functools import cache

import timm
import torch
from torch import Tensor, nn

from dgnet.graph import DynamicGraph, find_stages
from tests.helpers.networks import spread_routers

NETWORKS: dict[str, tuple[str, dict[str, object]]] = {
    "resnet": ("test_resnet", {"layers": (3, 1, 2, 1)}),  # an activation after the addition
    "convnext": ("test_convnext", {"depths": (1, 2, 3, 1)}),
    "efficientnet": ("test_efficientnet", {"depth_multiplier": 3.0}),  # `has_skip`
    "vit": ("test_vit", {"depth": 4, "img_size": 32}),  # tokens
    "swin": (  # channels last; an even and a shifted window
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "drop_path_rate": 0.0},
    ),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 24, "depth": 3, "num_heads": 2}),  # rotary positions
}
LAYOUTS = {"resnet": "NCHW", "convnext": "NCHW", "efficientnet": "NCHW", "vit": "NLC", "swin": "NHWC", "eva": "NLC"}


def build_static(name: str, **options: object) -> nn.Module:
    """A network of `NETWORKS` in evaluation mode, always with the same weights; its normalisations are as after training."""
    return copy.deepcopy(_build(name, tuple(sorted(options.items()))))


@cache
def _build(name: str, options: tuple[tuple[str, object], ...]) -> nn.Module:
    timm_name, given = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shake_all_norms(timm.create_model(timm_name, num_classes=7, **{**given, **dict(options)})).eval()


def shake_all_norms(network: nn.Module) -> nn.Module:
    """Random affine parts and statistics, and layer scales near 1, so that every block changes its input."""
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in network.named_parameters():
            part = network.get_submodule(name.rpartition(".")[0])
            if "norm" in type(part).__name__.lower() and parameter.ndim == 1:
                if name.endswith(".weight"):
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.2)
            elif not parameter.any():  # such as a classifier, or the last normalisation of a block
                parameter.normal_(std=0.1)
            elif name.endswith(("gamma", "gamma1", "gamma2", "gamma_1", "gamma_2", "layer_scale")):
                parameter.uniform_(0.5, 1.5)
    return network


def draw_images(name: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images that a network of `NETWORKS` takes, of different colours: a gate may decide differently for each."""
    side = int(str(NETWORKS[name][1].get("img_size", 32)))
    return torch.randn(batch, 3, side, side, dtype=dtype) + 2 * torch.randn(batch, 3, 1, 1, dtype=dtype)


def use_gates(network: nn.Module, std: float = 4.0) -> list[DynamicGraph]:
    """Draw routers and gates of a converted network with gates, so that blocks are skipped for some images. Its stages."""
    stages = find_stages(network)
    for stage in stages:
        spread_routers(stage, std)
        assert stage.node_gates is not None
        nn.init.zeros_(stage.node_gates.bias)
    return stages


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
