"""The Lightning modules of training, and the data module of classification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from dgnet.data import (
    IGNORED,
    BadImages,
    EvaluationOrder,
    ImageDataset,
    Preprocessing,
    ShardStream,
    TrainingItems,
    build_loader,
    mix_seed,
    worker_options,
)
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
from dgnet.training._budget import Budget
from dgnet.training._cached import CachedLoader
from dgnet.training._config import RunConfig, TrainConfig
from dgnet.training._loading import TrainingLoader, TrainingOrder


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

    def describe_figures(self, values: Mapping[str, float], is_evaluated: bool) -> str:
        """The text that is printed after an epoch. `values`: the epoch's metrics."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        self.first_bad_step = torch.tensor(-1, device=self.device)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Random numbers of a step do not depend on earlier steps: a resumed run draws the same ones.
        torch.manual_seed(mix_seed(self.config.seed, self.global_step, batch_index, self.global_rank))

    def finish_step(self, loss: Tensor, **hits: Tensor) -> dict[str, Any]:
        """The return value of a training step. `hits`: see `Progress`."""
        self.lr = self.trainer.optimizers[0].param_groups[0]["lr"]  # of this step; the scheduler changes it before it is logged
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
        config = self.config
        optimizer = create_optimizer_v2(
            build_parameter_groups(self.network, config),
            opt=config.optimizer,
            lr=config.peak_lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
        scheduler = self.build_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def build_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        """timm's schedule of the learning rate, by step."""
        raise NotImplementedError

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
    """Trains with cross-entropy and label smoothing; linear warm-up, then a half-period cosine, by step (§6.1)."""

    best = "val_top1"
    best_title = "epoch's top-1"
    config: TrainConfig

    def __init__(self, network: nn.Module, config: TrainConfig, carried: dict[str, Any], budget: Budget | None = None) -> None:
        executed = [] if budget is None else ["executed"]
        super().__init__(network, config, carried, build_means("train_", [*ACCURACY, *executed]))
        self.budget = budget
        edges = [name for pair in edge_figure_names(self.stages) for name in pair]
        self.val_metrics = build_means("val_", [*ACCURACY, *executed, *edges])

    def forward(self, images: Tensor) -> Tensor:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Any]:
        images, labels = batch
        logits, figures = self.observe(images)
        update_means(self.train_metrics, accuracy_figures(logits, labels) | figures, labels != IGNORED)
        smoothing = self.config.label_smoothing
        # L_t(T(x; W_n, W_r), y), Eq. (6), with label smoothing (§6.1).
        losses = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, ignore_index=IGNORED, reduction="none")
        loss = losses.sum() / (labels != IGNORED).sum().clamp(min=1)
        if self.budget is not None:
            progress = self.global_step / int(self.trainer.estimated_stepping_batches)
            executed = figures["executed"]
            if self.config.on_bad_image == "skip":
                executed = executed[labels != IGNORED]
            loss = loss + self.budget.penalty(executed, progress)
        return self.finish_step(loss, **{"top-1": (logits.detach().argmax(1) == labels).sum()})

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        meter = Means(self.val_metrics, self.find_figures, needs_connectivity=True)
        observe_batch(self.network, images, labels, [meter], run=self.observe)

    def find_figures(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The logged figures of each image, (B,), and which images count. `batch`: its outputs are those of `observe`."""
        logits, figures = batch.outputs
        edges = {} if batch.record is None else edge_figures(self.stages, batch.record.adjacency)
        return accuracy_figures(logits, batch.targets) | figures | edges, batch.targets != IGNORED

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
        warmup = round(steps * self.config.warmup_epochs / self.config.epochs)
        return CosineLRScheduler(
            optimizer,
            t_initial=max(steps - warmup, 1),
            warmup_t=warmup,
            warmup_prefix=True,
            warmup_lr_init=self.config.peak_lr / max(warmup, 1),
            t_in_epochs=False,
        )


def take_figures(metrics: MetricCollection) -> dict[str, Any]:
    """Compute `metrics`, accuracies in percent, and reset them."""
    values = {name: value * 100 if "top" in name else value for name, value in metrics.compute().items()}
    metrics.reset()
    return values


def build_parameter_groups(network: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Routers, thresholds and normalisation have groups of their own if an option gives them another decay or learning rate.
    """
    exempt: set[str] = getattr(network, "no_weight_decay", set)()
    groups = param_groups_weight_decay(network, config.weight_decay, no_weight_decay_list=exempt)
    stages = find_stages(network)
    weightings = [stage.weighting for stage in stages]
    gates = [stage.node_gates for stage in stages if stage.node_gates is not None]
    deciders = [weighting for weighting in weightings if weighting.reads_features]
    routing = [parameter for module in (*deciders, *gates) for parameter in module.parameters() if parameter.requires_grad]
    ids = {id(weighting.threshold) for weighting in weightings}
    thresholds = [parameter for parameter in routing if id(parameter) in ids]
    routers = [parameter for parameter in routing if id(parameter) not in ids]
    decay = config.weight_decay if config.routing_decay == "all" else 0.0
    apart: list[dict[str, Any]] = []
    if config.norm_decay:
        connectivity = {id(p) for module in (*weightings, *gates) for p in module.parameters()}
        plain = [p for name, p in network.named_parameters() if p.ndim <= 1 and p.requires_grad and id(p) not in connectivity]
        apart.append({"params": plain, "weight_decay": config.weight_decay})
    if config.routing_decay != "weights":
        apart.append({"params": routers, "weight_decay": decay})
    if config.routing_decay == "all" or config.threshold_lr != 1:
        apart.append({"params": thresholds, "weight_decay": decay, "lr_scale": config.threshold_lr})
    moved = {id(parameter) for group in apart for parameter in group["params"]}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    return [group for group in [*groups, *apart] if group["params"]]


class RunDataModule(L.LightningDataModule):
    """The common part of data modules: a run can be resumed only with the same number of training images.

    `source`: the training data, as typed by the user.
    """

    train: Sized

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    @property
    def ranks(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes."""
        return self.running.global_rank, self.running.world_size

    @property
    def running(self) -> L.Trainer:
        """The trainer; it must be attached."""
        assert self.trainer is not None
        return self.trainer

    def state_dict(self) -> dict[str, Any]:
        return {"images": len(self.train)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UsageError if the number of training images has changed."""
        images = state_dict["images"]
        if images != len(self.train):
            raise UsageError(
                f"the run was interrupted with {images:,} training images and cannot continue with the {len(self.train):,} of"
                f" --data {self.source}"
            )


class ImageDataModule(RunDataModule):
    """Loaders for data sets whose transforms are set. `folder`: the run folder, where bad images are listed.

    Training leaves out the images that do not fill a step. Evaluation reads each image once.
    """

    train: ImageDataset | ShardStream

    def __init__(
        self,
        train: ImageDataset | ShardStream,
        val: ImageDataset,
        config: TrainConfig,
        preprocessing: Preprocessing,
        folder: Path,
    ) -> None:
        super().__init__(config.data)
        self.train, self.val = train, val
        self.config, self.preprocessing = config, preprocessing
        self.folder = folder

    @property
    def batch_size(self) -> int:
        """Images in a batch of one device."""
        return self.config.batch_size // (self.running.world_size * self.config.accumulate)

    def train_dataloader(self) -> TrainingLoader:
        config, trainer = self.config, self.running
        order = TrainingOrder(len(self.train), config.batch_size, config.seed, *self.ranks, config.accumulate)
        batches: Iterable[Any]
        if isinstance(self.train, ShardStream):
            self.train.rank, self.train.ranks = self.ranks
            self.train.bad = self._bad_images()
            batches = DataLoader(self.train, batch_size=self.batch_size, **worker_options(config.workers))
        elif config.cache:
            hflip = config.hflip if self.train.flips else 0.0
            batches = self._cache(self.train, order=order, augment=config.augment, hflip=hflip)
        else:
            batches = self._load(self.train, order)
        return TrainingLoader(batches, order, lambda: trainer.global_step)

    def val_dataloader(self) -> Iterable[Any]:
        if self.config.cache:
            return self._cache(self.val)
        return self._load(self.val, EvaluationOrder(len(self.val), self.batch_size, *self.ranks))

    def _load(self, dataset: ImageDataset, order: TrainingOrder | EvaluationOrder) -> DataLoader[Any]:
        items = TrainingItems(dataset, self.preprocessing.input_shape, self.config.seed, self._bad_images())
        return build_loader(items, order, self.config.workers)

    def _bad_images(self) -> BadImages | None:
        if self.config.on_bad_image == "error":
            return None
        # The first process chose the run folder.
        folder: str = self.running.strategy.broadcast(str(self.folder))
        return BadImages(Path(folder) / "bad_images.txt", self.config.max_bad_images)

    def _cache(self, dataset: ImageDataset, **options: Any) -> CachedLoader:
        device = self.running.strategy.root_device
        return CachedLoader(dataset, self.preprocessing, self.batch_size, device=device, **options)
