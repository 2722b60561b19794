"""Training a classifier: from a configuration to a run folder."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from dgnet.checkpoint import create_pretrained, describe_network
from dgnet.data import ImageDataset, Preprocessing, ShardStream, imagenet_classes, open_train_and_evaluation, set_max_pixels
from dgnet.errors import UnknownOptionError, UsageError
from dgnet.graph import compile_options
from dgnet.models import InstaNAS, TimmNetwork, match_image_size, needed_packages, static_start_options, stored_options
from dgnet.training._budget import Budget
from dgnet.training._config import TrainConfig
from dgnet.training._data_module import ImageDataModule
from dgnet.training._freezing import Freezing
from dgnet.training._head import load_start, settle_head
from dgnet.training._module import Classifier
from dgnet.training._prepare_search import prepare_search
from dgnet.training._run import Run, RunResult, check_single_image, open_run, with_absolute_paths
from dgnet.training._search_module import SearchClassifier
from dgnet.training._teacher import absolute_teacher, build_teacher

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
    network, config = _create_network(config, train_set.class_names, run)
    preprocessing, config = prepare_data(config, network, train_set, val_set)
    if config.weights and run.step is None:
        start = config.start, preprocessing.image_size
        _, line = load_start(network, config.model, config.weights, train_set.class_names, *start)
        run.say(f"{config.weights}: {line}")
    if isinstance(network, InstaNAS):
        config, latency = prepare_search(network, config, preprocessing.image_size, run)
    else:
        config.check_without_controller(config.model)
    budget = None
    if config.budget is not None:
        how = (config.budget_per, config.budget_strength, config.budget_warmup, config.budget_rule)
        budget = Budget(network, preprocessing.image_size, config.budget, *how)
    teacher = None if config.teacher is None else build_teacher(config, train_set.class_names, preprocessing)
    config = with_absolute_paths(config, sources=("data", "val_data"))
    config = replace(config, teacher=absolute_teacher(config.teacher))
    options = stored_options(network, config.network_kwargs)
    described = config.model, options, train_set.class_names, preprocessing, asdict(config)
    carried = describe_network(*described, needed_packages(config.model, config.imports))
    parameters = sum(p.numel() for p in network.parameters())
    if config.grad_checkpointing:
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise UsageError(f"{config.model} has no gradient checkpointing; leave out --grad-checkpointing") from None
    freezing = None
    if config.freeze is not None:
        freezing = Freezing(network, config.model, config.freeze, config.freeze_epochs)
        run.say(freezing.describe())
    networks = [network] if teacher is None else [network, teacher.network]
    if config.channels_last:
        for one in networks:
            one.to(memory_format=torch.channels_last)
    if isinstance(network, InstaNAS):
        module: Classifier = SearchClassifier(network, config, carried, latency, teacher)
    else:
        module = Classifier(network, config, carried, budget, teacher, freezing)
    trainer = run.build_trainer(config, module.best)
    in_batch = config.batch_size // (trainer.world_size * config.accumulate)
    if config.mixes and in_batch % 2:
        raise UsageError(
            f"--mixup and --cutmix mix images in pairs, and a batch has {in_batch} (--batch-size {config.batch_size});"
            " make it an even number"
        )
    if config.cache and trainer.world_size > 1:
        raise UsageError(f"--cache true trains in one process, and this run has {trainer.world_size}")
    check_single_image(network, preprocessing.image_size, config, trainer.world_size)
    if config.compile:
        for one in networks:
            options = compile_options(one, trainer.strategy.root_device.type)
            one.compile(fullgraph=True, options=options)  # in place: the state dict keeps its keys
    about = (
        f"{config.model}, {parameters:,} parameters, on {len(train_set):,} images of {classes} classes"
        f" at {'×'.join(map(str, preprocessing.image_size))} pixels, {config.epochs} epoch{'s' * (config.epochs != 1)}"
    )
    return run.fit(trainer, module, ImageDataModule(train_set, val_set, config, preprocessing, run.folder), about)


def _create_network(config: TrainConfig, class_names: list[str], run: Run) -> tuple[TimmNetwork, TrainConfig]:
    """The network of `config`, and `config` with the options of `--start static` where it is asked for.

    A run that begins with `--pretrained true` has published weights, any other an untrained network.
    """
    classes = len(class_names)
    fixed = {"num_classes": classes, **({} if config.in_chans is None else {"in_chans": config.in_chans})}
    try:
        if not config.pretrained or run.step is not None:
            network = run.create_network(config, **fixed)
            if config.start == "static":
                config = config.with_network(static_start_options(network, config.network_kwargs))
                network = run.create_network(config, **fixed)
            return network, config
        network = create_pretrained(config.model, "--pretrained true", "--weights FILE", **fixed, **config.network_kwargs)
    except UnknownOptionError as error:
        if config.budget is not None and error.option == "node_gate":
            needs = "a network with dynamic stages whose blocks can get gates"
            raise UsageError(f"--budget needs {needs}; {config.model} has none") from None
        asked = config.find_option(error.option)
        if asked is not None:
            raise UsageError(f"{asked}: {config.model} has no option {error.option}; leave it out") from None
        raise
    if network.pretrained_cfg.get("num_classes") == classes:
        run.say(f"--pretrained true: {settle_head(network, [], class_names, imagenet_classes(classes))}")
    else:
        run.say(f"--pretrained true: published for other classes; reset the classifier to {classes} classes")
    return network, config


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
        raise UsageError(
            f"--cache true needs --augment pad-crop, reflect-crop or none; images of {preprocessing.image_size} use rrc"
        )
    config.check_use(augment, config.cache)
    train.transform = preprocessing.training_transform(augment, config.hflip if train.flips else 0.0, config.augmentation)
    val.transform = preprocessing.evaluation_transform()
    height, width = preprocessing.image_size
    config = replace(config, image_size=height if height == width else None, augment=augment)
    return preprocessing, config.resolve(network)
