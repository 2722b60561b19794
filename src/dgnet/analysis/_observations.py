"""§6.5's five observations as computable criteria, and whether they hold for a network.

An edge's *order* is that of its sending node, whose router predicts its weight: from 0 (input node) to 1 (output node).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgnet.analysis._statistics import Statistics

Array = NDArray[np.float64]

# The smallest value with which an observation holds; its number is in brackets.
LEAST_SPREAD = 0.05  # (1), (3): standard deviation over the edges, as a share of their mean
LEAST_EXPLAINED = 0.2  # (1), (3): share of the variance over the edges that order and stage explain
LEAST_CORRELATION = 0.2  # (2), (4): absolute value of the rank correlation
LEAST_DIFFERENCE = 0.01  # (5): as a share of the images, of the mean weight, and of the multiply-adds


@dataclass(frozen=True)
class Observation:
    """One of §6.5's observations, and the figures that decide it."""

    number: int
    claim: str
    holds: bool | None  # None: cannot be decided with these images
    because: str
    figures: dict[str, float | None]  # None: not defined for this network or data

    def __str__(self) -> str:
        verdict = {True: "holds", False: "does not hold", None: "cannot be decided"}[self.holds]
        return f"({self.number}) {self.claim}: {verdict}. {self.because}"


def judge(statistics: Statistics) -> list[Observation]:
    """The five observations for a network, over its free edges."""
    free = statistics.free.numpy()
    edges = [edge for edge in statistics.edges if edge.is_free]
    sizes = [topology.num_nodes - 1 for topology in statistics.topologies]
    stages = np.array([edge.stage for edge in edges], dtype=float)
    senders = np.array([edge.sender / sizes[edge.stage - 1] for edge in edges])
    receivers = np.array([edge.receiver / sizes[edge.stage - 1] for edge in edges])
    mean = statistics.mean().numpy()[free]
    std = statistics.std().numpy()[free]
    positions = np.stack([stages, senders, receivers], axis=1)
    return [
        _differences(1, "edges' mean weights differ, and depend on order and stage", mean, positions),
        _front_is_larger(mean, stages, senders),
        _differences(
            3, "the spread of weights over images differs between edges, and depends on order and stage", std, positions
        ),
        _back_varies_more(std, stages, senders),
        _samples_differ(statistics, float(abs(mean).mean()) if len(mean) else 0.0, std),
    ]


def _differences(number: int, claim: str, values: Array, positions: Array) -> Observation:
    size = float(abs(values).mean()) if len(values) else 0.0
    spread = float(values.std()) / size if size else 0.0
    explained = explained_share(values, positions)
    figures = {"spread": spread, "explained": explained}
    if len(values) and not values.any():
        return Observation(number, claim, False, "No weight depends on the image.", figures)
    said = f"Their spread over the edges is {100 * spread:.1f} % of their mean (needed: {100 * LEAST_SPREAD:.0f} %)"
    if explained is None:
        return Observation(number, claim, None, f"{said}; {len(values)} edges are too few to explain it.", figures)
    said += f"; order and stage explain {100 * explained:.0f} % of the differences (needed: {100 * LEAST_EXPLAINED:.0f} %)."
    return Observation(number, claim, spread >= LEAST_SPREAD and explained >= LEAST_EXPLAINED, said, figures)


def _front_is_larger(mean: Array, stages: Array, senders: Array) -> Observation:
    claim = "in a stage, the out-edges of front nodes have larger weights"
    within, said = _within_stages(senders, mean, stages)
    because = f"Rank correlation of order and mean weight {said} (needed: at most {-LEAST_CORRELATION} on average)."
    return Observation(2, claim, within is not None and within <= -LEAST_CORRELATION, because, {"correlation": within})


def _back_varies_more(std: Array, stages: Array, senders: Array) -> Observation:
    claim = "the weights of back nodes' out-edges vary more, and so do those of deep stages"
    within, said = _within_stages(senders, std, stages)
    depth = rank_correlation(stages, std)
    figures = {"correlation": within, "stage_correlation": depth}
    if not std.any():
        return Observation(4, claim, False, "No weight depends on the image.", figures)
    because = (
        f"Rank correlation of order and standard deviation {said}; of stage and standard deviation {_format(depth)}"
        f" (needed: at least {LEAST_CORRELATION} for both)."
    )
    holds = all(value is not None and value >= LEAST_CORRELATION for value in (within, depth))
    return Observation(4, claim, holds, because, figures)


def _samples_differ(statistics: Statistics, mean: float, std: Array) -> Observation:
    claim = "structure and weights differ between images, and easy images cost less"
    wirings = statistics.wiring.wirings
    other = 1 - max(wirings.values()) / statistics.images
    spread = float(std.mean()) / mean if mean else 0.0
    easy, hard = executed_by_ease(statistics)
    saved = None if easy is None or hard is None else 1 - easy / hard
    figures = {"other_wiring": other, "spread": spread, "saved_by_easy": saved, "executed_easy": easy, "executed_hard": hard}
    because = (
        f"{100 * other:.2f} % of the images have other open edges than the most common wiring; a weight's standard deviation is"
        f" {100 * spread:.1f} % of the mean weight; "
    )
    if easy is None or hard is None or saved is None:
        because += "without labels the easy images are not known"
    else:
        because += (
            f"of {len(statistics.sample.losses):,} sampled images the half with the smaller loss executes {easy / 1e6:.2f} M"
            f" multiply-adds, the other half {hard / 1e6:.2f} M, {abs(100 * saved):.2f} % {'less' if saved >= 0 else 'more'}"
        )
    because += f" (needed: {100 * LEAST_DIFFERENCE:.0f} % each)."
    verdicts = [None if value is None else value >= LEAST_DIFFERENCE for value in (other, spread, saved)]
    return Observation(5, claim, False if False in verdicts else None if None in verdicts else True, because, figures)


def executed_by_ease(statistics: Statistics) -> tuple[float | None, float | None]:
    """Mean multiply-adds of the half of the sampled images with the smaller loss, and of the other half.

    (None, None) with fewer than two labelled images.
    """
    losses, executed = statistics.sample.losses.numpy(), statistics.sample.executed.numpy()
    order = losses.argsort(kind="stable")[: np.isfinite(losses).sum()]  # NaN is sorted last
    if len(order) < 2:
        return None, None
    half = len(order) // 2
    return float(executed[order[:half]].mean()), float(executed[order[half:]].mean())


def explained_share(values: Array, positions: Array) -> float | None:
    """Share of the variance of `values`, (E,), that a linear function of `positions`, (E, P), explains: adjusted R².

    0 if nothing varies or if R² is no higher than by chance; None for fewer than P + 2 values.
    """
    count, predictors = positions.shape
    if count < predictors + 2:
        return None
    total = float(np.square(values - values.mean()).sum())
    if not total:
        return 0.0
    design = np.column_stack([np.ones(count), positions])
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    residual = float(np.square(values - design @ solution).sum())
    adjusted: float = 1 - (residual / (count - predictors - 1)) / (total / (count - 1))
    return max(adjusted, 0.0)


def rank_correlation(first: Array, second: Array) -> float | None:
    """Spearman's rank correlation; ties get their mean rank. None if one of the two does not vary."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(len(values) < 2 or not values.std() for values in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Array) -> Array:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _within_stages(orders: Array, values: Array, stages: Array) -> tuple[float | None, str]:
    """Mean over the stages of the rank correlation of order and value, and a text with the value of each stage."""
    found = [rank_correlation(orders[stages == stage], values[stages == stage]) for stage in np.unique(stages)]
    defined = [value for value in found if value is not None]
    mean = math.fsum(defined) / len(defined) if defined else None
    return mean, f"{_format(mean)}, by stage {', '.join(map(_format, found))}"


def _format(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"
