"""A checkpoint from a file of weights only, such as timm's: what the file does not say follows from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgnet.checkpoint import NOT_STORED, Checkpoint, find_checkpoint, fit_weights, read_tensors
from dgnet.data import Preprocessing, imagenet_classes, number_classes
from dgnet.errors import UsageError
from dgnet.models import TimmNetwork, classifier_prefixes, create_model, first_convolutions, match_image_size


def read_weights(
    path: str | Path,
    model: str,
    model_kwargs: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> tuple[Checkpoint, list[str]]:
    """The weights in `path` as a checkpoint of `model`, and the parameters that the file lacks, which stay as initialised.

    The number of classes and of input channels follows from the file; the preprocessing is the model's own, at `image_size`
    pixels if that is given. `class_names`: by default ImageNet's if the model's own classes are, else "class 0", "class 1", …
    What stays as initialised (routers, if the weights are of a static network) is the same in every call.

    Raises UsageError for a checkpoint of dgnet, which says all this itself, for weights of another model, and for another
    number of class names.
    """
    path = find_checkpoint(path)
    state_dict, carried = read_tensors(path)
    if carried is not None:
        raise UsageError(
            f"{path} is a checkpoint of {carried.get('model')} with its own classes and preprocessing; leave out --model"
        )
    options, image_size = match_image_size(model, model_kwargs or {}, image_size)
    for name in NOT_STORED:
        if name in options:
            raise UsageError(f"--model-kwargs cannot set {name}: it follows from the weights")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = create_model(model, **options)
        own_classes = network.pretrained_cfg.get("num_classes")
        classes = _count_classes(network, state_dict, f"{path} does not hold the weights of {model}")
        channels = _count_channels(network, state_dict)
        preprocessing = Preprocessing.of(network.pretrained_cfg, image_size, channels)
        if classes != network.num_classes or channels != 3:
            torch.default_generator.manual_seed(0)
            network = create_model(model, num_classes=classes, **preprocessing.network_options, **options)
    untrained = fit_weights(network, model, path, state_dict).untrained
    if class_names is None:
        class_names = (imagenet_classes(classes) if own_classes == classes else None) or number_classes(classes)
    if len(class_names) != classes:
        raise UsageError(f"{path} has {classes:,} classes, and {len(class_names):,} are named; give one name for each class")
    checkpoint = Checkpoint(path, network.state_dict(), model, options, list(class_names), {}, preprocessing)
    return checkpoint, untrained


def _count_classes(network: TimmNetwork, state_dict: Mapping[str, Tensor], misfit: str) -> int:
    """The number of outputs of the classifier in `state_dict`. Raises UsageError, which begins with `misfit`."""
    prefixes = classifier_prefixes(network)
    for name in (f"{prefix}{part}" for prefix in prefixes for part in ("weight", "bias")):
        if name in state_dict and state_dict[name].ndim:
            return len(state_dict[name])
    if not prefixes:
        raise UsageError(f"{misfit}: it has no classifier, so there are no classes to evaluate; use another model")
    raise UsageError(f"{misfit} with a classifier (it lacks {prefixes[0]}weight); name its own model with --model")


def _count_channels(network: TimmNetwork, state_dict: Mapping[str, Tensor]) -> int:
    """The number of input channels of the first convolution in `state_dict`; 3 if it is not there."""
    weights = (state_dict.get(f"{name}.weight") for name in first_convolutions(network))
    return next((weight.shape[1] for weight in weights if weight is not None and weight.ndim == 4), 3)
