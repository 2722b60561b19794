"""Whether two networks compute the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""The largest difference between logits that counts as rounding, as a share of the largest logit."""


def find_difference(expected: nn.Module, found: nn.Module, images: Tensor) -> float:
    """The largest difference between the logits of two networks in evaluation, as a share of the largest logit expected.

    `images`: (B, C, H, W). The modes of the networks stay as they are.
    """
    first, second = (_run(network, images) for network in (expected, found))
    return float((second - first).abs().max() / first.abs().max().clamp(min=1e-12))


@torch.no_grad()
def _run(network: nn.Module, images: Tensor) -> Tensor:
    was_training = network.training
    try:
        output = network.eval()(images)
    finally:
        network.train(was_training)
    outputs = output if isinstance(output, list | tuple) else [output]
    return torch.cat([part.flatten(1).float() for part in outputs], dim=1)
