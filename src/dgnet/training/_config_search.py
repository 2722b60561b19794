"""Options of training a network whose controller chooses its modules: InstaNAS (Cheng et al., AAAI 2020).

Rewards and the rates of the search are by default those of the authors' code (github.com/AnjieCheng/InstaNAS).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dgnet.errors import UsageError
from dgnet.options import check_bounds, flag, option
from dgnet.training._config_optimizer import LARGEST_RATE
from dgnet.typed import Location

_BOUNDS: dict[str, tuple[float, ...]] = {
    "search_epochs": (0,),
    "tune_epochs": (0,),
    "module_drop": (0, 1),
    "latency_target": (0, 1000),
    "controller_lr": (0, LARGEST_RATE),
    "search_lr": (0, LARGEST_RATE),
    "tune_lr": (0, LARGEST_RATE),
    "exploration": (0.5, 1),
    "entropy": (0, LARGEST_RATE),
    "reward": (0, LARGEST_RATE),
    "reward_wrong": (-LARGEST_RATE, 0),
}


@dataclass(frozen=True)
class SearchOptions:
    """How an InstaNAS network is trained: its meta-graph, then controller and meta-graph in turns, then the meta-graph."""

    search_epochs: int | None = option(
        None,
        "InstaNAS: epochs of the search, an even number: one for the controller and one for the meta-graph, in turns; by"
        " default about a third of --epochs",
    )
    tune_epochs: int | None = option(
        None,
        "InstaNAS: last epochs, in which the meta-graph is trained as the controller chooses; by default a third of --epochs",
    )
    module_drop: float = option(
        0.5,
        "InstaNAS: probability at the end of the first phase that a module is left out for an image; 0 in its first half, from"
        " there on it rises",
    )
    latency_target: float = option(
        0.5,
        "InstaNAS: upper bound of an image's latency at the end of the search, as a share of that of MobileNetV2's modules",
    )
    latency_device: str = option(
        "cpu", "InstaNAS: where the latency of the modules is measured: cpu, or run: where the run trains", ("cpu", "run")
    )
    latency_table: Location | None = option(
        None, "InstaNAS: latency.json of another run, instead of measuring: for runs that are to be compared or repeated"
    )
    controller_lr: float = option(0.001, "InstaNAS: learning rate of the controller, whose optimiser is Adam")
    search_lr: float = option(0.01, "InstaNAS: learning rate of the meta-graph in the search, as a share of --lr")
    tune_lr: float = option(0.01, "InstaNAS: first learning rate of the last epochs, as a share of --lr; it falls as a cosine")
    exploration: float = option(
        0.8, "InstaNAS: a in a·p + (1 - a)·(1 - p), the probability with which the search opens a module of probability p"
    )
    entropy: float = option(0.8, "InstaNAS: weight of the entropy of the controller's choices in its loss")
    reward: float = option(10.0, "InstaNAS: highest reward of a correct answer, half way between least latency and upper bound")
    reward_wrong: float = option(-10.0, "InstaNAS: reward of a wrong answer")

    def check(self) -> None:
        """Raises UsageError for a value that is not allowed."""
        check_bounds(self, _BOUNDS)
        if self.search_epochs is not None and self.search_epochs % 2:
            raise UsageError(f"--search-epochs must be even, because a turn is two epochs, got {self.search_epochs}")
        if self.latency_table is not None and self.latency_device != "cpu":
            raise UsageError("--latency-device has no effect with --latency-table; leave it out")

    def given_search(self) -> str | None:
        """The first option of this group that differs from its default, as it is typed; None if there is none."""
        names = (f.name for f in fields(SearchOptions) if getattr(self, f.name) != f.default)
        return next((flag(name) for name in names), None)

    def check_without_controller(self, model: str) -> None:
        """Raises UsageError if an option of this group is given for a network that has no controller."""
        given = self.given_search()
        if given is not None:
            raise UsageError(f"{given} needs a network with a controller, such as instanas_cifar, and {model} has none")
