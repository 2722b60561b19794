"""What the weights of edges depend on, and how clear the gradients are that train them.

Letters: B images, N nodes of a stage, K mini-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.experiments._edges import weigh_as_in_training
from dgnet.experiments._report import format_table
from dgnet.graph import DynamicGraph, find_stages, record_connectivity

_SAMPLE = 8  # images whose gradients are compared with those of others
_BATCH = 64  # images of the mini-batch that the figures are for


def format_signal(rows: Sequence[Sequence[str]]) -> str:
    """The rows of `compare_signal` as a Markdown table."""
    heads = ["run", "stage", "spread of a weight, start", "trained", "between classes, %"]
    heads += ["gradient of routing, signal / noise, start", "trained", "of convolutions, start", "trained"]
    return format_table(heads, [list(row) for row in rows])


def compare_signal(name: str, start: nn.Module, trained: nn.Module, images: Tensor, labels: Tensor) -> list[list[str]]:
    """One row for each stage: the figures of `measure_spread` and `measure_signal`, before and after training.

    The share between classes is that after training. The networks are in evaluation mode. `images`: (B, 3, H, W); `labels`:
    (B,).
    """
    spreads = [measure_spread(network, images, labels) for network in (start, trained)]
    signals = [measure_signal(network, images, labels) for network in (start, trained)]
    rows = []
    for stage, ((before, _), (after, share)) in enumerate(zip(*spreads, strict=True)):
        routing, convolutions = zip(*(found[stage] for found in signals), strict=True)
        cells = [f"{before:.3f}", f"{after:.3f}", _format(None if share is None else 100 * share, 0)]
        rows.append([name, str(stage + 1), *cells, *(_format(value, 2) for value in (*routing, *convolutions))])
    return rows


def _format(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


@torch.no_grad()
def measure_spread(network: nn.Module, images: Tensor, labels: Tensor) -> list[tuple[float, float | None]]:
    """For each stage: how much an edge's weight differs between images, and what share of it between images of other classes.

    The first is a standard deviation: the root of the mean variance of the stage's weights. The share is that of a
    one-way analysis of variance (the intraclass correlation): near 0 if weights are no more alike within a class than between
    classes, 1 if images of a class have the same weights. None if weights do not differ, if there are fewer than two classes,
    or if no class has two images.
    """
    with record_connectivity(network) as record:
        network(images)
    found = []
    for stage, matrix in zip(find_stages(network), record.adjacency, strict=True):
        weights = matrix[:, stage.topology.mask].flatten(1).double()
        found.append((float(weights.var(0).mean().sqrt()), _share_between(weights, labels)))
    return found


def _share_between(values: Tensor, labels: Tensor) -> float | None:
    """The intraclass correlation of `values`, (B, n), summed over n before it becomes a ratio."""
    classes, members, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    count, groups = len(labels), len(classes)
    if groups < 2 or count == groups:
        return None
    means = torch.zeros(groups, values.shape[1], dtype=values.dtype).index_add(0, members, values) / sizes[:, None]
    within = float((values - means[members]).square().sum()) / (count - groups)
    between = float((sizes[:, None] * (means - values.mean(0)).square()).sum()) / (groups - 1)
    usual_size = (count - float(sizes.square().sum()) / count) / (groups - 1)
    variance = max(between - within, 0.0) / usual_size
    return variance / (variance + within) if variance + within > 0 else None


def measure_signal(network: nn.Module, images: Tensor, labels: Tensor) -> list[tuple[float | None, float | None]]:
    """For each stage the ratio of signal to noise in the gradient of its routing parameters, and of its convolutions.

    The signal is the norm of the expected gradient, the noise that of the difference from it in a mini-batch of 64 images. Both
    are estimated from mini-batches of 8, with weights as in training; normalisations keep the statistics of evaluation. Routing
    parameters are those of the weighting and of block gates. None without such parameters, and with fewer than 16 images.
    """
    stages = find_stages(network)
    parts = [part for stage in stages for part in (_routing(stage), _convolutions(stage))]
    batches = list(zip(images.split(_SAMPLE), labels.split(_SAMPLE), strict=True))
    batches = [batch for batch in batches if len(batch[1]) == _SAMPLE]
    sums = [_Gradients() for _ in parts]
    with weigh_as_in_training(network):
        for batch, classes in batches:
            network.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(network(batch), classes).backward()
            for part, gradients in zip(parts, sums, strict=True):
                gradients.add(_gather(part))
    network.zero_grad()
    ratios = [gradients.signal_to_noise() for gradients in sums]
    return list(zip(ratios[::2], ratios[1::2], strict=True))


def _routing(stage: DynamicGraph) -> list[Tensor]:
    modules: list[nn.Module | None] = [stage.weighting, stage.node_gates]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _convolutions(stage: DynamicGraph) -> list[Tensor]:
    modules = [module for node in stage.nodes for module in node.modules()]
    return [module.weight for module in modules if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))]


def _gather(parameters: Sequence[Tensor]) -> Tensor:
    """The gradients of some parameters as one vector; zeros for parameters without."""
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    return torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)


class _Gradients:
    """The gradients of some parameters in K mini-batches, of which only sums are kept."""

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.total = torch.zeros((), dtype=torch.float64)

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of a mini-batch of `_SAMPLE` images, (n,)."""
        self.count += 1
        self.squares += float(gradient.double().square().sum())
        self.total = self.total + gradient.double()

    def signal_to_noise(self) -> float | None:
        """The ratio for a mini-batch of `_BATCH` images; None without noise, or fewer than two mini-batches."""
        if self.count < 2:
            return None
        mean = float(self.total.square().sum()) / self.count**2  # the square of its norm
        noise = (self.squares - self.count * mean) / (self.count - 1)
        signal = mean - noise / self.count  # a mean of K is nearer to it, but not on it
        return (max(signal, 0.0) / (noise * _SAMPLE / _BATCH)) ** 0.5 if noise > 0 else None
