"""Whether two networks compute the same: their logits, and the classes that they predict.

Letters: B batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dgnet.compat.torch import find_tensors
from dgnet.errors import UsageError
from dgnet.models._isolation import keep_modes

TOLERANCE = 1e-4
"""The largest difference between logits that counts as rounding, as a share of the largest logit."""


_ROUNDINGS = 16
"""Units in the last place that count as rounding where that is more than `TOLERANCE`: in half precision."""


def find_tolerance(network: nn.Module) -> float:
    """`TOLERANCE`, or more for a network with parameters of half precision."""
    kinds = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
    return max([TOLERANCE, *(_ROUNDINGS * torch.finfo(kind).eps for kind in kinds)])


@dataclass(frozen=True)
class Agreement:
    """How far a converted network agrees with the static one on some images."""

    images: int
    difference: float  # the largest of any logit, relative to the largest logit
    same_class: float  # percent of the images for which both predict the same class
    top1_static: float | None = None  # percent of the labelled images; None if no image has a label
    top1: float | None = None  # of the converted network

    def require(self, network: str, tolerance: float = TOLERANCE) -> None:
        """Raises UsageError if the difference is above `tolerance`. `network`: what the static network is called."""
        if not self.difference <= tolerance:
            raise UsageError(
                f"the converted network differs from {network} by {self.difference:.1e} of the largest logit, more than"
                f" {tolerance:.0e}; name the modules to convert with stages, to leave out the one that differs"
            )


@dataclass
class Comparison:
    """Collects the outputs of both networks on batches of images."""

    images: int = 0
    difference: float = 0.0  # the largest of any logit
    largest: float = 0.0  # logit
    same: int = 0  # images of the same class
    labelled: int = 0
    right: list[int] = field(default_factory=lambda: [0, 0])  # of the labelled images, static and converted

    def add(self, static: Tensor, converted: Tensor, labels: Tensor | None = None) -> None:
        """Add the outputs for a batch, (B, K) each. `labels`: (B,); one below 0 is none."""
        static, converted = static.detach().float(), converted.detach().float()
        difference = (converted - static).abs().max()
        # Not max(): it would lose NaN.
        self.difference = float(torch.maximum(difference, difference.new_tensor(self.difference)))
        self.largest = max(self.largest, float(static.abs().max()))
        predicted = static.argmax(1), converted.argmax(1)
        self.images += len(static)
        self.same += int((predicted[0] == predicted[1]).sum())
        if labels is not None:
            self.labelled += int((labels >= 0).sum())
            self.right = [n + int((p == labels).sum()) for n, p in zip(self.right, predicted, strict=True)]

    def result(self) -> Agreement:
        """The figures over all batches so far."""
        top1 = [100 * n / self.labelled for n in self.right] if self.labelled else [None, None]
        return Agreement(self.images, self.difference / max(self.largest, 1e-12), 100 * self.same / self.images, *top1)


def compare(static: nn.Module, converted: nn.Module, images: Tensor) -> Agreement:
    """Compare two networks on `images`, (B, C, H, W), in evaluation. The modes of the networks stay as they are."""
    comparison = Comparison()
    comparison.add(_run(static, images), _run(converted, images))
    return comparison.result()


@torch.no_grad()
def _run(network: nn.Module, images: Tensor) -> Tensor:
    with keep_modes(network):
        outputs = [tensor for tensor in find_tensors(network.eval()(images)) if tensor.is_floating_point() and tensor.ndim]
    if not outputs:
        raise UsageError(f"{type(network).__name__} puts out no tensors that could be compared")
    return torch.cat([part.flatten(1).float() if part.ndim > 1 else part.float()[:, None] for part in outputs], dim=1)
