"""The Lightning modules of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torchmetrics import MetricCollection

from dgnet.data import IGNORED, mix_seed
from dgnet.errors import UsageError
from dgnet.evaluation import (
    ACCURACY,
    STATES,
    Batch,
    Means,
    accuracy_figures,
    build_means,
    edge_figure_names,
    edge_figures,
    observe_batch,
    update_means,
)
from dgnet.graph import find_stages
from dgnet.models import TimmNetwork, classifier_prefixes
from dgnet.training._budget import Budget
from dgnet.training._config import RunConfig, TrainConfig
from dgnet.training._freezing import Freezing
from dgnet.training._losses import ClassificationLoss
from dgnet.training._mixing import Mixing
from dgnet.training._optimizer import build_optimizer
from dgnet.training._parameter_groups import build_parameter_groups
from dgnet.training._schedule import build_schedule
from dgnet.training._teacher import Teacher


class RunModule(L.LightningModule):
    """The common part of training modules: seeds, optimiser, rows of metrics.csv, and the content of checkpoints.

    `carried`: plain values stored in each checkpoint, so that it can be evaluated without the command that made it.
    `train_metrics`: metrics of the epoch so far; a checkpoint stores their states.
    """

    best: str
    """The metric whose highest value is the best."""
    best_title: str
    """Its name in the summary line."""

    def __init__(self, network: nn.Module, config: RunConfig, carried: dict[str, Any], train_metrics: MetricCollection) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.carried = carried
        self.train_metrics = train_metrics
        self.stages = find_stages(network)
        self.first_bad_step = torch.tensor(-1)  # first step whose loss is not finite; not a buffer: DDP would overwrite it

    def describe_epoch(self) -> str:
        """How far training is, for the progress bar."""
        return f"epoch {self.current_epoch + 1}/{self.config.schedule()[0]}"

    def phase(self, epoch: int) -> int | None:
        """The phase of an epoch, if training has phases whose figures cannot be compared; the best is sought in each anew."""
        return None

    def describe_figures(self, values: Mapping[str, float], is_evaluated: bool) -> str:
        """The text that is printed after an epoch. `values`: the epoch's metrics."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        self.first_bad_step = torch.tensor(-1, device=self.device)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Random numbers of a step do not depend on earlier steps: a resumed run draws the same ones.
        self.step_seed = mix_seed(self.config.seed, self.global_step, batch_index, self.global_rank)
        torch.manual_seed(self.step_seed)

    def finish_step(self, loss: Tensor, **hits: Tensor) -> dict[str, Any]:
        """The return value of a training step. `hits`: see `Progress`."""
        first = self.trainer.optimizers[0].param_groups[0]
        self.lr = first["lr"] / (first.get("lr_scale") or 1.0)  # of this step; the scheduler changes it before it is logged
        is_bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(is_bad, self.global_step + 1)
        # Lightning divides "loss" by the number of accumulated batches; "value" is shown to the user.
        return {"loss": loss, "value": loss.detach(), "hits": hits}

    def on_validation_epoch_start(self) -> None:
        self.note_thresholds()  # here, because with --ema the network has the averaged weights now

    def note_thresholds(self) -> None:
        """Keep the mean of τ of each stage, for the row of metrics.csv."""
        self.thresholds = {
            f"stage{number}_threshold": stage.weighting.threshold.detach().mean()
            for number, stage in enumerate(self.stages, start=1)
            if stage.weighting.threshold is not None
        }

    def on_validation_epoch_end(self) -> None:
        # Validation ends an epoch: one call logs training and validation as one row of metrics.csv.
        self._log_row(self.evaluation_figures())

    def evaluation_figures(self) -> dict[str, Any]:
        """The figures of the evaluation that just ended, by name. Resets them."""
        raise NotImplementedError

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        # Not in `on_train_epoch_end`: there the callbacks, which print the row, run before the module.
        if self.trainer.is_last_batch and not self.evaluates_in(self.current_epoch):
            self.note_thresholds()
            self._log_row({}, on_step=False, on_epoch=True)

    def evaluates_in(self, epoch: int) -> bool:
        """Whether `epoch`, counted from 0, ends with an evaluation."""
        return (epoch + 1) % self.config.schedule()[1] == 0

    def _log_row(self, figures: dict[str, Any], **options: Any) -> None:
        self.log_dict({**take_figures(self.train_metrics), **figures, **self.thresholds, "lr": self.lr}, **options)

    def configure_optimizers(self) -> Any:
        # The updates of Eqs. (7) to (10): weights of nodes, of routers, their biases, thresholds. The gradients: dgnet.graph.
        optimizer = build_optimizer(self.parameter_groups(), self.config)
        scheduler = self.build_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters by weight decay and learning rate."""
        return build_parameter_groups(self.network, self.config)

    def build_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        """timm's schedule of the learning rate, by step."""
        raise NotImplementedError

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients as `--clip-mode` says."""
        if self.config.clip_mode == "norm":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            dispatch_clip_grad(self.clipped_parameters(), gradient_clip_val, self.config.clip_mode)

    def clipped_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients `--clip-mode value` and `agc` clip."""
        return list(self.network.parameters())

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dgnet"] = self.carried
        # Summed over all processes: a resumed epoch's metrics also count the images before the interruption.
        sums = {}
        for name, metric in self.train_metrics.items(keep_base=True):
            with metric.sync_context():
                sums[name] = {state: getattr(metric, state).clone() for state in STATES}
        checkpoint["train_metrics"] = sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.trainer.is_global_zero:
            return
        for name, metric in self.train_metrics.items(keep_base=True):
            for state in STATES:
                setattr(metric, state, checkpoint["train_metrics"][name][state].to(metric.device))


class Classifier(RunModule):
    """Trains with the loss of `ClassificationLoss`, and as the budget, the mixing, the teacher and the freezing say (§6.1)."""

    best = "val_top1"
    best_title = "epoch's top-1"
    network: TimmNetwork
    config: TrainConfig
    own_figures: tuple[str, ...] = ()
    """Figures of each image that a subclass adds."""

    def __init__(
        self,
        network: TimmNetwork,
        config: TrainConfig,
        carried: dict[str, Any],
        budget: Budget | None = None,
        teacher: Teacher | None = None,
        freezing: Freezing | None = None,
    ) -> None:
        executed = [*self.own_figures, *([] if budget is None else ["executed"])]
        super().__init__(network, config, carried, build_means("train_", [*ACCURACY, *executed]))
        self.budget, self.teacher, self.freezing = budget, teacher, freezing
        self.teacher_fingerprint = None if teacher is None else teacher.fingerprint()
        self.losses = ClassificationLoss(config)
        self.mixing = Mixing(config, network.num_classes) if config.mixes else None
        edges = [name for pair in edge_figure_names(self.stages) for name in pair]
        self.val_metrics = build_means("val_", [*ACCURACY, *executed, *edges])

    def forward(self, images: Tensor) -> Tensor:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        super().on_train_batch_start(batch, batch_index)
        if self.freezing is not None:
            self.freezing.apply(self.current_epoch, needs_gradients=self.trainer.world_size > 1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.freezing is not None:
            self.freezing.drop_gradients()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Any]:
        images, labels = batch
        targets = labels
        if self.mixing is not None:
            images, targets, labels = self.mixing(images, labels, self.current_epoch, self.step_seed)
        logits, figures = self.observe(images)
        update_means(self.train_metrics, self.judge(logits, labels, figures), labels != IGNORED)
        losses = self.losses(logits, targets)  # L_t(T(x; W_n, W_r), y), Eq. (6)
        if self.teacher is not None:
            share = self.config.teacher_weight
            losses = (1 - share) * losses + share * self.teacher.losses(logits, images)
        if self.mixing is not None or self.teacher is not None or self.config.bce_loss:
            losses = losses.masked_fill(labels == IGNORED, 0.0)
        loss = losses.sum() / (labels != IGNORED).sum().clamp(min=1)
        if self.budget is not None:
            steps = int(self.trainer.estimated_stepping_batches)
            progress = self.global_step / steps
            executed = figures["executed"]
            if self.config.on_bad_image == "skip":
                executed = executed[labels != IGNORED]
            loss = loss + self.budget.penalty(executed, progress)
            if self.budget.rule == "exact":
                self.budget.adapt(self._mean_of_all(executed.detach()), progress, steps * self.config.accumulate)
        return self.finish_step(loss, **{"top-1": (logits.detach().argmax(1) == labels).sum()})

    def _mean_of_all(self, values: Tensor) -> Tensor:
        """The mean of `values`, (n,), over the images of all processes; NaN if there are none."""
        sum_and_count = torch.stack([values.sum(), values.new_tensor(len(values))])
        total, count = self.trainer.strategy.reduce(sum_and_count, reduce_op="sum").unbind()
        mean: Tensor = total / count
        return mean

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        meter = Means(self.val_metrics, self.find_figures, needs_connectivity=True)
        observe_batch(self.network, images, labels, [meter], run=self.observe)

    def find_figures(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The logged figures of each image, (B,), and which images count. `batch`: its outputs are those of `observe`."""
        logits, figures = batch.outputs
        edges = {} if batch.record is None else edge_figures(self.stages, batch.record.adjacency)
        return self.judge(logits, batch.targets, figures) | edges, batch.targets != IGNORED

    def judge(self, logits: Tensor, labels: Tensor, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logged figures of each image, (B,). `figures`: those of `observe`."""
        return accuracy_figures(logits, labels) | figures

    def observe(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits; and, if there is a budget, `executed`: the share of the dense cost that each image executes, (B,)."""
        if self.budget is None:
            return self(images), {}
        with self.budget.watch():
            logits = self(images)
        return logits, {"executed": self.budget.executed()}

    def evaluation_figures(self) -> dict[str, Any]:
        return take_figures(self.val_metrics)

    def describe_figures(self, values: Mapping[str, float], is_evaluated: bool) -> str:
        line = f"train loss {values['train_loss']:.3f}, top-1 {values['train_top1']:.2f} %"
        if is_evaluated:
            line += f"; val loss {values['val_loss']:.3f}, top-1 {values['val_top1']:.2f} %"
            if "val_executed" in values:
                line += f", executed {values['val_executed']:.3f} of the dense cost"
        return line

    def build_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        return build_schedule(optimizer, self.config, steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return build_parameter_groups(self.network, self.config, self.config.layer_decay)

    def clipped_parameters(self) -> list[nn.Parameter]:
        heads = classifier_prefixes(self.network) if self.config.clip_mode == "agc" else ()
        return [parameter for name, parameter in self.network.named_parameters() if not name.startswith(heads)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.teacher_fingerprint is not None:
            checkpoint["teacher"] = self.teacher_fingerprint
        if self.budget is not None and self.budget.rule == "exact":
            checkpoint["budget_multiplier"] = float(self.budget.multiplier)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("teacher") != self.teacher_fingerprint:
            raise UsageError(
                f"--teacher {self.config.teacher} has other weights than when the run began; put them back, or start a new run"
            )
        if self.budget is not None and self.budget.rule == "exact":
            self.budget.multiplier = torch.tensor(checkpoint["budget_multiplier"])
        super().on_load_checkpoint(checkpoint)


def take_figures(metrics: MetricCollection) -> dict[str, Any]:
    """Compute `metrics`, accuracies in percent, and reset them."""
    values = {name: value * 100 if "top" in name else value for name, value in metrics.compute().items()}
    metrics.reset()
    return values
