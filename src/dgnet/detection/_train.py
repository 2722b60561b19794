"""Training a detector: from a configuration to a run folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from dgnet.data import set_max_pixels
from dgnet.detection._average_precision import CocoEvaluation, load_backend
from dgnet.detection._checkpoint import describe_detector, load_backbone, load_trained
from dgnet.detection._coco import CocoDetection
from dgnet.detection._config import DetectConfig
from dgnet.detection._detector import Detector
from dgnet.detection._module import DetectionDataModule, DetectionModule
from dgnet.errors import UsageError
from dgnet.models import needed_packages, stored_options
from dgnet.training import Run, RunResult, describe_untrained, open_run, with_absolute_paths


def train_detector(config: DetectConfig, resume: Path | None = None) -> RunResult:
    """Train a detector as `config` says, and write the run folder. `resume`: as in `dgnet.training.train`.

    Raises UsageError for a mistake in the configuration or the data, if possible before anything is written. Raises
    Interrupted if a signal ended the run after it saved a checkpoint.
    """
    with open_run(config, resume) as run:
        return _train(config, run)


def _train(config: DetectConfig, run: Run) -> RunResult:
    set_max_pixels(config.max_pixels)
    load_backend()  # before the data are read: it may be missing
    train_set = CocoDetection(config.data, config.images, is_training=True)
    val_set = CocoDetection(config.val_data, config.evaluation_images, class_names=train_set.class_names)
    run.record_data(train_set.ledger, val_set.ledger)
    run.check_data(len(train_set), train_set.class_names, config.batch_size)
    if val_set.annotations.is_crowd.all():
        raise UsageError(f"{config.val_data} holds no boxes to evaluate on; give other annotations with --val-data")
    evaluation = CocoEvaluation(val_set.annotations)
    network = run.create_network(config)
    config = config.resolve(network)
    config = with_absolute_paths(config)
    options = stored_options(network, config.network_kwargs)
    starts = config.weights is not None and run.step is None
    untrained = load_backbone(network, config.model, str(config.weights)) if starts else None
    if untrained:
        run.say(f"{config.weights}: {describe_untrained(network, untrained)}")
    classes = len(train_set.class_names)
    detector = Detector(network, classes, **config.detector_options)
    if starts and untrained is None and load_trained(detector, str(config.weights)):
        run.say(f"{config.weights}: trained for other classes; its last layers are reset to {classes} classes")
    carried = describe_detector(
        config.model,
        options,
        train_set.class_names,
        train_set.annotations.category_ids,
        config.detector_options,
        asdict(config),
        needed_packages(config.model, config.imports),
    )
    module = DetectionModule(detector, config, carried, evaluation)
    trainer = run.build_trainer(config, module.best)
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    about = (
        f"Faster R-CNN on {config.model}, {parameters:,} parameters, on {len(train_set):,} images of {classes} classes,"
        f" {config.iterations:,} iterations"
    )
    return run.fit(trainer, module, DetectionDataModule(train_set, val_set, config), about)
