"""A network of the user's own: a stem, residual blocks and a classifier, with any forward pass between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dgnet

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, *further: object) -> Tensor:
        return x + self.conv2(self.bn(self.conv1(x)).relu())


class Network(nn.Module):
    """Stem, blocks and classifier; `steps` is the forward pass between stem and classifier."""

    def __init__(self, steps, blocks: int = 3, **parts: object) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ModuleList(Block() for _ in range(blocks))
        self.head, self.steps = nn.Linear(4, 5), steps
        for name, part in parts.items():
            setattr(self, name, part)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)

    def forward(self, images: Tensor):
        x = self.steps(self, self.stem(images))
        return self.head(x.mean((2, 3))) if isinstance(x, Tensor) else x


def in_a_row(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = block(x)
    return x


def convert(network: nn.Module, **options: object) -> nn.Module:
    return dgnet.convert(network.eval(), image_size=16, **options)
