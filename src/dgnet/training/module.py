"""The Lightning module and data module of classification."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection

from dgnet.data import ImageDataset, Preprocessing
from dgnet.graph import DynamicGraph
from dgnet.training.budget import Budget
from dgnet.training.cached import CachedLoader
from dgnet.training.config import TrainConfig
from dgnet.training.metrics import build_metrics, update_metrics


class Classifier(L.LightningModule):
    """Cross-entropy with label smoothing, warm-up and half-period cosine by step (§6.1).

    `carried`: plain values that travel in each checkpoint, so that it can be evaluated without the command that made it.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, carried: dict[str, Any], budget: Budget | None = None) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.carried = carried
        self.train_metrics = build_metrics(len(carried["class_names"]), prefix="train_")
        self.val_metrics = build_metrics(len(carried["class_names"]), prefix="val_")
        self.budget = budget
        if budget is not None:
            for metrics in (self.train_metrics, self.val_metrics):
                metrics.add_metrics({"executed": MeanMetric()})

    def forward(self, images: Tensor) -> Tensor:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Tensor]:
        images, labels = batch
        logits, executed = self.observe(images)
        update_metrics(self.train_metrics, logits, labels, executed)
        self.lr = self.trainer.optimizers[0].param_groups[0]["lr"]  # this step's; the scheduler moves on before it is logged
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        if self.budget is not None and executed is not None:
            progress = self.global_step / int(self.trainer.estimated_stepping_batches)
            loss = loss + self.budget.penalty(executed, progress)
        return {"loss": loss, "correct": (logits.detach().argmax(1) == labels).sum()}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        logits, executed = self.observe(images)
        update_metrics(self.val_metrics, logits, labels, executed)

    def observe(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and where there is a budget what each image executes as a share of the dense cost, (B,)."""
        if self.budget is None:
            return self(images), None
        with self.budget.observe():
            logits = self(images)
        return logits, self.budget.executed()

    def on_validation_epoch_end(self) -> None:
        # Validation closes an epoch: training and validation in one call are one row of metrics.csv.
        self._log_metrics(self.train_metrics, self.val_metrics)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        # Not at the epoch's end: callbacks, which print it, come before the module there.
        if self.trainer.is_last_batch and not self.evaluates_in(self.current_epoch):
            self._log_metrics(self.train_metrics, on_step=False, on_epoch=True)

    def evaluates_in(self, epoch: int) -> bool:
        """Whether the epoch, counted from 0, ends with an evaluation."""
        return (epoch + 1) % self.config.evaluate_every == 0

    def _log_metrics(self, *collections: MetricCollection, **options: Any) -> None:
        values = {name: value for metrics in collections for name, value in metrics.compute().items()}
        percent = {name: value * 100 if "top" in name else value for name, value in values.items()}
        self.log_dict({**percent, "lr": self.lr}, **options)
        for metrics in collections:
            metrics.reset()

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = create_optimizer_v2(
            build_parameter_groups(self.network, config),
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * config.warmup_epochs / config.epochs)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(steps - warmup, 1),
            warmup_t=warmup,
            warmup_prefix=True,
            warmup_lr_init=config.lr / max(warmup, 1),
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dgnet"] = self.carried


def build_parameter_groups(network: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups with and without weight decay; routing apart where it decays otherwise, thresholds with their learning rate."""
    exempt: set[str] = getattr(network, "no_weight_decay", set)()
    groups = param_groups_weight_decay(network, config.weight_decay, no_weight_decay_list=exempt)
    stages = [module for module in network.modules() if isinstance(module, DynamicGraph)]
    deciders = [stage.weighting for stage in stages if stage.weighting.reads_features]
    gates = [stage.node_gates for stage in stages if stage.node_gates is not None]
    routing = [parameter for module in (*deciders, *gates) for parameter in module.parameters() if parameter.requires_grad]
    ids = {id(stage.weighting.threshold) for stage in stages}
    thresholds = [parameter for parameter in routing if id(parameter) in ids]
    routers = [parameter for parameter in routing if id(parameter) not in ids]
    decay = config.weight_decay if config.routing_decay == "all" else 0.0
    apart: list[dict[str, Any]] = []
    if config.routing_decay != "weights":
        apart.append({"params": routers, "weight_decay": decay})
    if config.routing_decay == "all" or config.threshold_lr != 1:
        apart.append({"params": thresholds, "weight_decay": decay, "lr_scale": config.threshold_lr})
    moved = {id(parameter) for group in apart for parameter in group["params"]}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    return [group for group in [*groups, *apart] if group["params"]]


class ImageDataModule(L.LightningDataModule):
    """Loaders over data sets whose transforms are set. Training leaves out a last batch that is not full.

    `batch_size`: of one device.
    """

    def __init__(
        self, train: ImageDataset, val: ImageDataset, config: TrainConfig, preprocessing: Preprocessing, batch_size: int
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.config, self.preprocessing = config, preprocessing
        self.kwargs: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": config.workers,
            "persistent_workers": config.workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> Iterable[Any]:
        if self.config.cache:
            hflip = self.config.hflip if self.train.flips else 0.0
            return self._cache(self.train, training=True, augment=self.config.augment, hflip=hflip)
        return DataLoader(self.train, shuffle=True, drop_last=True, **self.kwargs)

    def val_dataloader(self) -> Iterable[Any]:
        if self.config.cache:
            return self._cache(self.val)
        # A generator of its own: training goes the same way, however often it is evaluated.
        return DataLoader(self.val, generator=torch.Generator(), **self.kwargs)

    def _cache(self, dataset: ImageDataset, **options: Any) -> CachedLoader:
        device = self.trainer.strategy.root_device  # type: ignore[union-attr]
        return CachedLoader(dataset, self.preprocessing, self.kwargs["batch_size"], device=device, **options)
