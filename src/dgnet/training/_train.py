"""Training a classifier: from a configuration to a run folder."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from dgnet.checkpoint import DESCRIPTION, damaged, describe_network, find_checkpoint, fit_weights, read_tensors
from dgnet.data import ImageDataset, Preprocessing, ShardStream, imagenet_classes, open_train_and_evaluation, set_max_pixels
from dgnet.errors import UnknownOptionError, UsageError
from dgnet.models import TimmNetwork, create_model, match_image_size, stored_options
from dgnet.training._budget import Budget
from dgnet.training._config import TrainConfig
from dgnet.training._head import settle_head
from dgnet.training._module import Classifier, ImageDataModule
from dgnet.training._run import Run, RunResult, check_single_image, open_run, with_absolute_paths
from dgnet.typed import Label, read_entry

_DIGITS_SIZE = 16  # pixels: digits are 8×8, too small for a network with stride 4


def train(config: TrainConfig, resume: Path | None = None) -> RunResult:
    """Train a classifier as `config` says, and write the run folder.

    `resume`: the folder of a run to continue from its last checkpoint; see `read_run`.

    Raises UsageError for a mistake in the configuration or the data, if possible before anything is written. Raises
    Interrupted if a signal ended the run after it saved a checkpoint.
    """
    with open_run(config, resume) as run:
        return _train(config, run)


def _train(config: TrainConfig, run: Run) -> RunResult:
    set_max_pixels(config.max_pixels)
    train_set, val_set = open_train_and_evaluation(
        config.data, config.val_data, config.data_root, config.holdout, config.epoch_images, as_before=run.is_of_old_version
    )
    run.record_data(train_set.ledger, val_set.ledger)
    run.check_data(len(train_set), train_set.class_names, config.batch_size)
    classes = len(train_set.class_names)
    if classes < 2:
        raise UsageError(f"{config.data} holds one class, {train_set.class_names[0]!r}; a classifier needs two or more")
    size = config.image_size or (_DIGITS_SIZE if config.data == "digits" else None)
    model_kwargs, size = match_image_size(config.model, config.model_kwargs, size)
    config = replace(config, model_kwargs=model_kwargs, image_size=size)
    try:
        channels = {} if config.in_chans is None else {"in_chans": config.in_chans}
        network = create_model(config.model, num_classes=classes, **channels, **config.network_kwargs)
    except UnknownOptionError as error:
        if config.budget is not None and error.option == "node_gate":
            raise UsageError(f"--budget needs a network with dynamic stages; {config.model} has none") from None
        raise
    preprocessing, config = prepare_data(config, network, train_set, val_set)
    if config.weights and run.step is None:
        run.say(f"{config.weights}: {_start_from_weights(network, config, train_set.class_names)}")
    budget = None
    if config.budget is not None:
        how = (config.budget_per, config.budget_strength, config.budget_warmup)
        budget = Budget(network, preprocessing.image_size, config.budget, *how)
    config = with_absolute_paths(config, sources=("data", "val_data"))
    options = stored_options(network, config.network_kwargs)
    carried = describe_network(config.model, options, train_set.class_names, preprocessing, asdict(config))
    parameters = sum(p.numel() for p in network.parameters())
    if config.grad_checkpointing:
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise UsageError(f"{config.model} has no gradient checkpointing; leave out --grad-checkpointing") from None
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    module = Classifier(network, config, carried, budget)
    trainer = run.build_trainer(config, module.best)
    if config.cache and trainer.world_size > 1:
        raise UsageError(f"--cache true trains in one process, and this run has {trainer.world_size}")
    check_single_image(network, preprocessing.image_size, config, trainer.world_size)
    if config.compile:
        network.compile(fullgraph=True)  # in place: the state dict keeps its keys
    about = (
        f"{config.model}, {parameters:,} parameters, on {len(train_set):,} images of {classes} classes"
        f" at {'×'.join(map(str, preprocessing.image_size))} pixels, {config.epochs} epoch{'s' * (config.epochs != 1)}"
    )
    return run.fit(trainer, module, ImageDataModule(train_set, val_set, config, preprocessing, run.folder), about)


def _start_from_weights(network: TimmNetwork, config: TrainConfig, class_names: list[str]) -> str:
    """Load `--weights` into `network`. Returns a line on what was loaded."""
    path = find_checkpoint(str(config.weights))
    state_dict, carried = read_tensors(path)
    untrained = fit_weights(network, config.model, path, state_dict, carried)
    classes = len(class_names)
    known = imagenet_classes(classes) if network.pretrained_cfg.get("num_classes") == classes else None
    if carried is not None:
        with damaged(path):
            known = read_entry(carried, "class_names", list[Label], DESCRIPTION)
    return settle_head(network, untrained, class_names, known)


def prepare_data(
    config: TrainConfig, network: TimmNetwork, train: ImageDataset | ShardStream, val: ImageDataset
) -> tuple[Preprocessing, TrainConfig]:
    """Set the transforms of both data sets. Returns the preprocessing for the checkpoint, and the resolved configuration."""
    preprocessing = Preprocessing.of(network.pretrained_cfg, config.image_size, config.in_chans, config.mean, config.std)
    if config.crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=config.crop_pct)
    augment = config.augment
    if augment == "auto":
        augment = "pad-crop" if max(preprocessing.image_size) <= 64 else "rrc"
    if config.cache and augment == "rrc":
        raise UsageError(f"--cache true needs --augment pad-crop or none; images of {preprocessing.image_size} use rrc")
    train.transform = preprocessing.training_transform(augment, config.hflip if train.flips else 0.0)
    val.transform = preprocessing.evaluation_transform()
    height, width = preprocessing.image_size
    config = replace(config, image_size=height if height == width else None, augment=augment)
    return preprocessing, config.resolve(network)
