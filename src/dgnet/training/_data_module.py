"""The data modules of training: from data sets to loaders."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from dgnet.data import (
    BadImages,
    EvaluationOrder,
    ImageDataset,
    Preprocessing,
    ShardStream,
    TrainingItems,
    build_loader,
    worker_options,
)
from dgnet.errors import UsageError
from dgnet.training._cached import CachedLoader
from dgnet.training._config import TrainConfig
from dgnet.training._loading import TrainingLoader, TrainingOrder


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
        order = TrainingOrder(
            len(self.train), config.batch_size, config.seed, *self.ranks, config.accumulate, config.aug_repeats
        )
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
