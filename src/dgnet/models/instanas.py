"""InstaNAS (Cheng et al., AAAI 2020): a meta-graph of MobileNetV2-like cells; a controller chooses its modules for each image.

A cell has five modules side by side, and its output is the sum of the modules that are open for the image. All choices are made
at once, from the image, before the first cell runs. The sizes of meta-graph and controller are those of the authors' code
(github.com/AnjieCheng/InstaNAS, `search/models`). What differs, and why:

- An untrained controller opens all modules: its last layer starts near a probability of σ(0.2) = 0.55, not near 0.5. So a
  network whose controller was not trained yet runs as its whole meta-graph.
- The controller's shortcuts are 1×1 convolutions where the shape changes, not average pooling with zeros for new channels.

Letters: B batch, M modules of a cell, L cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

from dgnet.compat.timm import InvertedResidual
from dgnet.errors import UsageError, check_range
from dgnet.graph import DynamicGraph, FixedWeighting, least_logit, parallel, without_autocast
from dgnet.models._dynamic import Transform
from dgnet.models._factory import build_model, imagenet_cfg
from dgnet.models._protocol import TimmNetwork
from dgnet.models._staged import StagedNetwork, read_sizes


def build_plain_module(in_channels: int, channels: int, stride: int) -> Transform:
    """Two 3×3 convolutions, each with BN and activation, without a shortcut: the "basic" module."""
    module = Transform()
    module.add_module("conv1", nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False))
    module.add_module("bn1", nn.BatchNorm2d(channels))
    module.add_module("act1", nn.ReLU(inplace=True))
    module.add_module("conv2", nn.Conv2d(channels, channels, 3, padding=1, bias=False))
    module.add_module("bn2", nn.BatchNorm2d(channels))
    module.add_module("act2", nn.ReLU6(inplace=True))
    return module


def build_inverted_module(in_channels: int, channels: int, stride: int, kernel_size: int, expansion: int) -> nn.Module:
    """MobileNetV2's inverted residual block, with its shortcut if it keeps the shape."""
    return InvertedResidual(in_channels, channels, kernel_size, stride, exp_ratio=expansion)


MODULES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "3x3_e6": partial(build_inverted_module, kernel_size=3, expansion=6),
    "3x3_e3": partial(build_inverted_module, kernel_size=3, expansion=3),
    "5x5_e6": partial(build_inverted_module, kernel_size=5, expansion=6),
    "5x5_e3": partial(build_inverted_module, kernel_size=5, expansion=3),
    "basic": build_plain_module,
}
"""The modules of each cell, in order. "3x3_e6": kernel 3×3, expansion 6."""

REFERENCE = list(MODULES).index("3x3_e6")
"""The module that makes the meta-graph a MobileNetV2 if each cell runs it alone."""
FALLBACK = list(MODULES).index("basic")
"""The module that runs in a cell that changes the shape if the controller chooses none."""


class Cell(DynamicGraph):
    """x -> Σ_m gate_m · module_m(x). If no gate is open: x, or, if the cell changes the shape, what its basic module computes.

    A cell that keeps the shape has one node more than modules, the identity, which runs if no module does.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        keeps_shape = in_channels == channels and stride == 1
        nodes = [build(in_channels, channels, stride) for build in MODULES.values()]
        if keeps_shape:
            nodes.append(nn.Identity())
        topology = parallel(len(nodes) + 2)
        weighting = FixedWeighting(topology, channels)
        super().__init__(topology, weighting, nn.Identity(), nodes, nn.Identity(), entry_shortcut=False, takes_gates=True)
        self.keeps_shape = keeps_shape

    def complete(self, chosen: Tensor) -> Tensor:
        """The gates of all nodes, (B, M) or (B, M + 1) bool, from the modules that were chosen, (B, M) bool."""
        is_empty = ~chosen.any(1, keepdim=True)
        if self.keeps_shape:
            return torch.cat([chosen, is_empty], dim=1)
        return torch.cat([chosen[:, :FALLBACK], chosen[:, FALLBACK:] | is_empty], dim=1)


class Controller(nn.Module):
    """A small residual network on the image: the logits of the probability that each module runs, (B, L, M).

    `channels`: of each stage, of one basic block. `is_large`: for images of 224 pixels; it reads them at half
    their size, and begins with a 7×7 convolution of stride 2 and a max-pool.
    """

    start = (0.2, 0.001)
    """Initial bias of a logit, and standard deviation of the initial weights of the last layer."""

    def __init__(self, in_chans: int, channels: Sequence[int], cells: int, is_large: bool) -> None:
        super().__init__()
        self.cells = cells
        width = channels[0]
        stem: list[nn.Module] = [nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        if is_large:
            stem[0] = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
            stem = [nn.AvgPool2d(2, ceil_mode=True), *stem, nn.MaxPool2d(3, stride=2, padding=1)]
        self.stem = nn.Sequential(*stem)
        blocks = []
        for index, planes in enumerate(channels):
            stride = 1 if index == 0 else 2
            projection = None if stride == 1 else downsample_conv(width, planes, 1, stride, norm_layer=nn.BatchNorm2d)
            blocks.append(BasicBlock(width, planes, stride, projection))
            width = planes
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, cells * len(MODULES))

    def reset_parameters(self) -> None:
        """Set the last layer to its initial values, with which all modules run."""
        bias, std = self.start
        nn.init.constant_(self.fc.bias, bias)
        nn.init.normal_(self.fc.weight, std=std)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.blocks(self.stem(images))).flatten(1)
        with without_autocast(images):
            logits: Tensor = self.fc(pooled.to(self.fc.weight.dtype))
            return logits.view(-1, self.cells, len(MODULES))


def _read_sizes(name: str, sizes: Any, stages: int | None = None) -> list[int]:
    """One whole number for each stage."""
    read = read_sizes(name, sizes, list[int])
    if not read or len(read) != (stages or len(read)):
        raise UsageError(f"{name} lists a number for each of {stages or 'the'} stages, got {read}")
    return read


class InstaNAS(StagedNetwork):
    """A meta-graph and its controller. Each stage is a sequence of cells; the first cell of a stage may change the shape.

    `layers`, `channels`, `strides`: cells, C and stride of each stage. `controller_channels`: of the controller's blocks.
    `large_images`: the controller is that for images of 224 pixels. `latency`: milliseconds of each module, (L, M), as
    measured before the search; until then 0.
    """

    has_own_graphs = True
    """It has dynamic stages, but none of the options of `Connectivity`."""
    stem_names = ("conv1", "bn1", "act1")
    neck_names = ("conv2", "bn2", "act2")
    latency: Tensor

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, chosen: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        layers: Sequence[int] = (1, 2, 3, 4, 3, 3, 1),
        channels: Sequence[int] = (16, 24, 32, 64, 96, 160, 320),
        strides: Sequence[int] = (1, 1, 2, 2, 1, 2, 1),
        stem_channels: int = 32,
        stem_stride: int = 1,
        head_channels: int = 1280,
        controller_channels: Sequence[int] = (16, 32, 64),
        large_images: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        depths = _read_sizes("layers", layers)
        widths, steps = (_read_sizes(*each, len(depths)) for each in (("channels", channels), ("strides", strides)))
        widths_of_controller = _read_sizes("controller_channels", controller_channels)
        check_range("stem_channels", stem_channels, 1)
        check_range("head_channels", head_channels, 1)
        check_range("stem_stride", stem_stride, 1, 2)
        self.in_chans = in_chans
        self.controller = Controller(in_chans, widths_of_controller, sum(depths), large_images)
        self.conv1 = nn.Conv2d(in_chans, stem_channels, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": stem_channels, "reduction": stem_stride, "module": "act1"}]
        self.stage_names = tuple(f"layer{number}" for number in range(1, len(depths) + 1))
        self.first_cells = dict(zip(self.stage_names, (sum(depths[:stage]) for stage in range(len(depths))), strict=True))
        width, reduction = stem_channels, stem_stride
        for name, depth, planes, stride in zip(self.stage_names, depths, widths, steps, strict=True):
            shapes = zip([width, *[planes] * (depth - 1)], [stride, *[1] * (depth - 1)], strict=True)
            self.add_module(name, nn.Sequential(*[Cell(before, planes, step) for before, step in shapes]))
            width, reduction = planes, reduction * stride
            self.feature_info.append({"num_chs": planes, "reduction": reduction, "module": name})
        self.conv2 = nn.Conv2d(width, head_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head_channels)
        self.act2 = nn.ReLU(inplace=True)
        self.register_buffer("latency", torch.zeros(sum(depths), len(MODULES)))
        self.num_features = head_channels
        self.build_head(num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        self.controller.reset_parameters()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each module in the backward pass."""
        for cell in self.cells:
            cell.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem and controller, then each cell, neck."""
        return {**super().group_matcher(coarse), "stem": r"^(?:controller|conv1|bn1)\b"}

    @property
    def cells(self) -> list[Cell]:
        """The cells, in order, without those that `prune_intermediate_layers` removed."""
        stages = (
            getattr(self, name) for name in self.stage_names
        )  # every pass reads them: a search in all modules takes longer
        return [cast(Cell, cell) for stage in stages if isinstance(stage, nn.Sequential) for cell in stage]

    def choose(self, images: Tensor) -> Tensor:
        """Which modules the controller opens for each image, (B, L, M) bool: those of probability ½ and more."""
        chosen: Tensor = self.controller(images) >= least_logit(self.cells[0].threshold_offset if self.cells else 0.0)
        return chosen

    def start_pass(self, images: Tensor, chosen: Tensor | None = None) -> Callable[[str, Tensor], Tensor]:
        """As for every staged network. `chosen`: which modules run, (B, L, M) bool; None: the controller's choice."""
        choices = self.choose(images) if chosen is None else chosen
        if choices.shape[1:] != self.latency.shape:  # the stages check the number of images
            raise UsageError(f"the modules of an image are {tuple(self.latency.shape)}, got {tuple(choices.shape[1:])}")

        def run(name: str, x: Tensor) -> Tensor:
            stage = getattr(self, name)
            if isinstance(stage, nn.Identity):  # removed by `prune_intermediate_layers`
                return x
            for index, cell in enumerate(stage, start=self.first_cells[name]):
                x = cell(x, cell.complete(choices[:, index]))
            return x

        return run

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The logits. `chosen`: which modules run for each image, (B, L, M) bool; None: the controller's choice."""
        return self.forward_head(self.run_layers(x, self.start_pass(x, chosen))[0])

    def complete(self, chosen: Tensor) -> Tensor:
        """The modules that run, (B, L, M) bool, from those that were chosen: cells that change the shape run one at least."""
        return torch.stack([cell.complete(chosen[:, index])[:, : len(MODULES)] for index, cell in enumerate(self.cells)], dim=1)

    def estimate_latency(self, chosen: Tensor) -> Tensor:
        """The sum of the measured milliseconds of the modules that run for each image, (B,)."""
        return (self.complete(chosen) * self.latency).sum((1, 2))


_SETTINGS: dict[str, dict[str, Any]] = {
    "instanas_cifar": {},
    "instanas_imagenet": {
        "strides": (1, 2, 2, 2, 1, 2, 1),
        "stem_stride": 2,
        "controller_channels": (16, 32, 64, 128),
        "large_images": True,
        "num_classes": 1000,
    },
}

_CIFAR = {"input_size": (3, 32, 32), "num_classes": 10, "pool_size": (4, 4), "crop_pct": 1.0}
_CIFAR |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
default_cfgs = generate_default_cfgs(
    {
        "instanas_cifar": imagenet_cfg(first_conv=("conv1", "controller.stem.0"), classifier="fc", **_CIFAR),
        "instanas_imagenet": imagenet_cfg(first_conv=("conv1", "controller.stem.1"), classifier="fc"),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> TimmNetwork:
    features = {"out_indices": (0, 2, 3, 5, 7), "feature_cls": "getter"}
    return build_model(InstaNAS, name, pretrained, features, **{**_SETTINGS[name], **kwargs})


@register_model
def instanas_cifar(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """InstaNAS for images of 32×32 pixels: 17 cells of five modules."""
    return _create("instanas_cifar", pretrained, **kwargs)


@register_model
def instanas_imagenet(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """InstaNAS for images of 224×224 pixels: 17 cells of five modules."""
    return _create("instanas_imagenet", pretrained, **kwargs)
