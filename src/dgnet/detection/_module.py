"""The Lightning module and data module of detection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from timm.scheduler import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.utils.data import DataLoader

from dgnet.data import EvaluationOrder, build_loader
from dgnet.detection._average_precision import CocoEvaluation, DetectionMeter
from dgnet.detection._batching import AspectRatioOrder, DetectionItems, collate
from dgnet.detection._coco import CocoDetection, Target
from dgnet.detection._config import DetectConfig
from dgnet.detection._detector import Detector
from dgnet.evaluation import Batch, Means, build_means, edge_figure_names, edge_figures, observe_batch
from dgnet.training import EndlessOrder, RunDataModule, RunModule, TrainingLoader, take_figures

LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
"""The losses of torchvision's Faster R-CNN. `loss` is their sum."""


class DetectionModule(RunModule):
    """Trains with Faster R-CNN's four losses; the learning rate warms up, then falls in steps. Validates with COCO's AP."""

    best = "val_ap"
    best_title = "AP"
    network: Detector
    config: DetectConfig

    def __init__(self, detector: Detector, config: DetectConfig, carried: dict[str, Any], evaluation: CocoEvaluation) -> None:
        super().__init__(detector, config, carried, build_means("train_", ("loss", *LOSSES)))
        self.evaluation = evaluation
        self.val_edges = build_means("val_", [name for pair in edge_figure_names(self.stages) for name in pair])

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_index: int) -> dict[str, Any]:
        images, targets = batch
        losses: dict[str, Tensor] = self.network(images, targets)
        loss = torch.stack([losses[name].float() for name in LOSSES]).sum()
        weight = loss.new_tensor([float(len(images))])
        for name, value in {"loss": loss, **losses}.items():
            self.train_metrics[name].update(value.detach()[None], weight)
        return self.finish_step(loss)

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_index: int) -> None:
        images, targets = batch
        edges = Means(self.val_edges, self.find_figures, needs_connectivity=True)
        observe_batch(self.network, images, targets, [edges, DetectionMeter(self.evaluation)])

    def find_figures(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The logged figures of each image, (B,), and which images count."""
        counts = torch.tensor([target["image_id"] is not None for target in batch.targets], device=self.device)
        return {} if batch.record is None else edge_figures(self.stages, batch.record.adjacency), counts

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.evaluation.reset()

    def evaluation_figures(self) -> dict[str, Any]:
        figures = asdict(self.evaluation.compute())
        known = {name: value for name, value in figures.items() if name.startswith("ap") and isinstance(value, float)}
        return {**{f"val_{name}": value for name, value in known.items()}, **take_figures(self.val_edges)}

    def describe_epoch(self) -> str:
        return f"iteration {self.global_step:,}/{self.config.iterations:,}"

    def describe_figures(self, values: Mapping[str, float], is_evaluated: bool) -> str:
        losses = ", ".join(f"{name.removeprefix('loss_')} {values[f'train_{name}']:.3f}" for name in LOSSES)
        return f"train loss {values['train_loss']:.3f} ({losses}); AP {values['val_ap']:.2f}, AP50 {values['val_ap50']:.2f}"

    def build_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        config = self.config
        return MultiStepLRScheduler(
            optimizer,
            decay_t=[step + 1 for step in config.lr_steps],  # timm counts from 1
            decay_rate=0.1,
            warmup_t=config.warmup_iterations,
            warmup_prefix=False,
            warmup_lr_init=config.peak_lr * config.warmup_factor,
            t_in_epochs=False,
        )


class DetectionDataModule(RunDataModule):
    """Loaders: training steps of only landscape or only portrait images; evaluation with each image once."""

    train: CocoDetection

    def __init__(self, train: CocoDetection, val: CocoDetection, config: DetectConfig) -> None:
        super().__init__(config.data)
        self.train, self.val, self.config = train, val, config

    def train_dataloader(self) -> TrainingLoader:
        config, trainer = self.config, self.running
        order = AspectRatioOrder(self.train.aspect_ratios, config.batch_size, config.seed, *self.ranks, config.accumulate)
        endless = EndlessOrder(order, config.evaluate_every)
        items = DetectionItems(self.train, config.hflip, config.seed)
        return TrainingLoader(build_loader(items, endless, config.workers, collate), endless, lambda: trainer.global_step)

    def val_dataloader(self) -> DataLoader[Any]:
        order = EvaluationOrder(len(self.val), self.config.evaluation_batch_size, *self.ranks)
        return build_loader(DetectionItems(self.val), order, self.config.workers, collate)
