"""Options of fine-tuning: what training starts from, what it keeps, and whom it follows."""

from __future__ import annotations

from dataclasses import dataclass

from dgnet.errors import UsageError
from dgnet.options import check_bounds, flag, option

_BOUNDS: dict[str, tuple[float, ...]] = {
    "drop": (0, 1),
    "drop_path": (0, 1),
    "layer_decay": (0, 1),
    "freeze_epochs": (1,),
    "teacher_temperature": (0.01, 1000),
    "teacher_weight": (0, 1),
    "bce_target_thresh": (0, 1),
}

ORIGINAL = "original"
"""The teacher that is the network's own static form, with the weights from which training starts."""

HEAD = "head"


@dataclass(frozen=True)
class FineTuningOptions:
    """How a trained network is trained further."""

    pretrained: bool = option(False, "start from the weights that timm publishes for --model")
    freeze: str | None = option(
        None, "head: train only the classifier; a number: do not train this many first groups (the stem, then stages or blocks)"
    )
    freeze_epochs: int | None = option(None, "with --freeze: train everything after this many epochs; by default never")
    layer_decay: float | None = option(
        None, "factor of the learning rate from each layer to the one before it, as in 0.75 (not of routers and gates)"
    )
    drop: float | None = option(None, "dropout before the classifier; by default the model's own")
    drop_path: float | None = option(None, "probability of leaving out a residual branch in training (stochastic depth)")
    bce_loss: bool = option(False, "train with binary cross-entropy, one for each class")
    bce_sum: bool = option(False, "with --bce-loss: the sum over the classes instead of their mean")
    bce_target_thresh: float | None = option(None, "with --bce-loss: targets above this count as 1, others as 0")
    teacher: str | None = option(
        None,
        "also follow the outputs of this network: original (the static network with the weights from which training starts),"
        " a run folder or checkpoint, or a name in timm with published weights",
    )
    teacher_temperature: float = option(2.0, "temperature of both networks' probabilities in the loss of --teacher")
    teacher_weight: float = option(0.5, "share of the teacher's loss in the whole loss")

    def check(self) -> None:
        """Raises UsageError for a value that is not allowed."""
        check_bounds(self, _BOUNDS)
        if self.freeze is not None and self.freeze != HEAD and not (self.freeze.isdecimal() and int(self.freeze) >= 1):
            raise UsageError(f"--freeze must be head, or a number of groups from 1 on, got {self.freeze!r}")
        if self.layer_decay == 0:
            raise UsageError("--layer-decay must be above 0, got 0")
        for name, needed, is_there in (
            ("freeze_epochs", "--freeze", self.freeze is not None),
            ("bce_sum", "--bce-loss true", self.bce_loss),
            ("bce_target_thresh", "--bce-loss true", self.bce_loss),
            ("teacher_temperature", "--teacher", self.teacher),
            ("teacher_weight", "--teacher", self.teacher),
        ):
            if getattr(self, name) != getattr(FineTuningOptions, name) and not is_there:
                raise UsageError(f"{flag(name)} needs {needed}; add it, or leave {flag(name)} out")

    def check_start(self, weights: str | None) -> None:
        """Raises UsageError unless training starts from trained weights where an option needs them. `weights`: a file."""
        if self.pretrained and weights is not None:
            raise UsageError("--pretrained true and --weights both say where training starts; leave one of them out")
        if self.pretrained or weights is not None:
            return
        if self.freeze is not None:
            raise UsageError(
                f"--freeze {self.freeze} would freeze random weights; give trained ones with --weights or --pretrained true"
            )
        if self.teacher == ORIGINAL:
            raise UsageError("--teacher original has random weights; give trained ones with --weights or --pretrained true")
