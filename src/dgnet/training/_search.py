"""The training of InstaNAS's controller: phases, reward, policy gradient (Cheng et al., AAAI 2020, §3).

A module's gate is an independent Bernoulli variable. The controller's gradient is REINFORCE with a self-critical baseline: the
reward of the sampled modules minus that of the modules of probability ½ and more.

Letters: B batch, M modules of a cell, L cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgnet.errors import UsageError
from dgnet.models import FALLBACK, REFERENCE, InstaNAS
from dgnet.training._config import TrainConfig

_FIRST_BOUND = 0.7
"""The upper bound of latency when the search starts, as a share of the latency of all modules: as in the authors' code."""

_LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True)
class Phases:
    """The epochs of the three phases. Epochs are counted from 0.

    1: the meta-graph, with modules left out at random. 2: the search, a turn is an epoch of the controller and one of the
    meta-graph. 3: fine-tuning of the meta-graph.
    """

    first: int
    search: int
    tune: int

    @classmethod
    def of(cls, config: TrainConfig) -> Phases:
        """The phases of `config`, which says the length of each."""
        assert config.search_epochs is not None
        assert config.tune_epochs is not None
        return cls(config.epochs - config.search_epochs - config.tune_epochs, config.search_epochs, config.tune_epochs)

    def number(self, epoch: int) -> int:
        """The phase of an epoch: 1, 2 or 3."""
        return 1 if epoch < self.first else 2 if epoch < self.first + self.search else 3

    def trains_controller(self, epoch: int) -> bool:
        """Whether the controller is trained in this epoch, and not the meta-graph."""
        return self.number(epoch) == 2 and (epoch - self.first) % 2 == 0

    def name(self, epoch: int) -> str:
        """What an epoch trains, in words."""
        if self.number(epoch) == 2:
            return "search, controller" if self.trains_controller(epoch) else "search, meta-graph"
        return "meta-graph" if self.number(epoch) == 1 else "fine-tuning"

    def progress(self, epoch: int) -> float:
        """How far the search is, 0 in its first turn and before, 1 in its last turn and after."""
        turn, turns = (epoch - self.first) // 2, self.search // 2
        return 0.0 if self.number(epoch) == 1 else min(turn / (turns - 1), 1.0) if turns > 1 else 1.0

    def drop(self, epoch: int, most: float) -> float:
        """The probability that a module is left out in an epoch of phase 1: rises from 0 to `most` in its second half."""
        half = self.first // 2
        return most * max(epoch + 1 - half, 0) / (self.first - half)


def resolve_phases(config: TrainConfig) -> tuple[int, int]:
    """The epochs of search and fine-tuning. Raises UsageError if they do not fit into all epochs."""
    third = config.epochs // 3
    search = third - third % 2 if config.search_epochs is None else config.search_epochs
    tune = (third if search else 0) if config.tune_epochs is None else config.tune_epochs
    first = config.epochs - search - tune
    if first < 0 or (first == 0 and config.weights is None):
        needed = "" if first < 0 else ", and the meta-graph needs some first, or trained --weights"
        raise UsageError(
            f"--search-epochs {search} and --tune-epochs {tune} leave {first} of --epochs {config.epochs}{needed}; use fewer"
        )
    if tune and not search:
        raise UsageError(f"--tune-epochs {tune} needs a search before it; add --search-epochs, or leave it out")
    if first:
        config.check_phases(first)
    return search, tune


@dataclass(frozen=True)
class Window:
    """The latencies, in milliseconds, between which a correct answer has a reward above 0: that of half way is 1."""

    low: float
    high: float

    def reward(self, latency: Tensor) -> Tensor:
        """The reward of a latency, (B,): a parabola, 1 half way, 0 at both ends and outside."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return (1 - ((latency - middle) / half).square()).clamp(min=0)


@dataclass(frozen=True)
class LatencyRange:
    """Sums of measured milliseconds: what always runs, MobileNetV2's modules, and all modules."""

    least: float
    reference: float
    total: float

    @classmethod
    def of(cls, network: InstaNAS) -> LatencyRange:
        latency = network.latency.double().cpu()
        needed = torch.tensor([not cell.keeps_shape for cell in network.cells], device="cpu")
        return cls(float(latency[needed, FALLBACK].sum()), float(latency[:, REFERENCE].sum()), float(latency.sum()))

    def check(self, target: float) -> None:
        """Raises UsageError if the upper bound at the end is not above what always runs."""
        if target * self.reference <= self.least:
            raise UsageError(
                f"--latency-target {target:g} is {target * self.reference:.3g} ms, and what always runs takes"
                f" {self.least:.3g} ms; use more than {self.least / self.reference:.3f}"
            )

    def window(self, progress: float, target: float) -> Window:
        """The window of a part of the search; its upper bound moves to `target` times MobileNetV2's latency."""
        end = target * self.reference
        start = max(_FIRST_BOUND * self.total, end)
        return Window(self.least, start + progress * (end - start))


def bound_probabilities(logits: Tensor, exploration: float) -> Tensor:
    """The probabilities with which modules are opened in the search: a·p + (1 - a)·(1 - p), p = σ(logit), a = `exploration`."""
    p = logits.sigmoid()
    return exploration * p + (1 - exploration) * (1 - p)


def reward_images(is_correct: Tensor, latency: Tensor, window: Window, most: float, wrong: float) -> Tensor:
    """The reward of each image, (B,): `most` times that of its latency if its class is right, otherwise `wrong`."""
    return torch.where(is_correct, most * window.reward(latency), wrong)


def policy_losses(logits: Tensor, opened: Tensor, advantage: Tensor, exploration: float, entropy: float) -> Tensor:
    """The controller's loss for each image, (B,): -advantage · log P(opened) - `entropy` · H.

    `logits`: (B, L, M); `opened`: the sampled modules, (B, L, M) bool; `advantage`: (B,). P is a product over modules, and H
    their entropy. Its gradient is the REINFORCE estimate, with the sign of a loss.
    """
    p = bound_probabilities(logits, exploration).clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    log_open, log_closed = p.log(), (1 - p).log()
    log_probability = torch.where(opened, log_open, log_closed).sum((1, 2))
    spread = -(p * log_open + (1 - p) * log_closed).sum((1, 2))
    return -advantage.detach() * log_probability - entropy * spread
