"""A checkpoint from a model's name, and weights without dgnet's description: what they do not say follows from the model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgnet.checkpoint._checkpoint import NOT_STORED, Checkpoint
from dgnet.checkpoint._files import find_checkpoint, read_tensors
from dgnet.checkpoint._fit import Loaded, fit_weights
from dgnet.data import Preprocessing, imagenet_classes, number_classes
from dgnet.errors import UsageError
from dgnet.models import (
    TimmNetwork,
    as_words,
    classifier_prefixes,
    create_model,
    describe_download,
    find_channels,
    first_convolutions,
    has_pretrained_weights,
    match_image_size,
    match_names,
    missing_options,
)


def read_weights(
    path: str | Path,
    model: str,
    model_kwargs: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> tuple[Checkpoint, Loaded]:
    """The weights in `path` as a checkpoint of `model`, and how they were loaded.

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
    return _describe(path, state_dict, model, model_kwargs, class_names, image_size)


def read_static(
    path: str | Path, model: str, model_kwargs: Mapping[str, Any], image_size: int | None = None
) -> tuple[Checkpoint, Loaded]:
    """As `read_weights`, also for a checkpoint of dgnet, which must be of the static network `model`.

    A checkpoint has its own classes and preprocessing, except for `image_size` if that is given. Raises UsageError for one of
    another or of a dynamic network.
    """
    path = find_checkpoint(path)
    state_dict, carried = read_tensors(path)
    if carried is None:
        return _describe(path, state_dict, model, model_kwargs, None, image_size)
    checkpoint = Checkpoint.of(path, state_dict, carried)
    if checkpoint.model != model:
        raise UsageError(f"{path} is a checkpoint of {checkpoint.model}, not of {model}; name its own model")
    stored = checkpoint.model_kwargs
    if stored.get("dynamic"):
        words = ["--model", model, *as_words(missing_options(stored)), "--weights", str(path)]
        raise UsageError(
            f"{path} is of a network that was converted already; fine-tune it with: dgnet train {shlex.join(words)} --data DATA"
        )
    if image_size is None:
        return replace(checkpoint, model_kwargs={**stored, **model_kwargs}, config={}), Loaded([])
    options, _ = match_image_size(model, {**stored, "img_size": None, **_check_options(model_kwargs)}, image_size)
    if options["img_size"] is None:
        del options["img_size"]
    preprocessing = replace(checkpoint.preprocessing, image_size=(image_size, image_size))
    resized = replace(checkpoint, model_kwargs=options, preprocessing=preprocessing, config={})
    network = resized.create_network(num_classes=len(checkpoint.class_names), **preprocessing.network_options)
    loaded = fit_weights(network, model, path, state_dict, carried)
    return replace(resized, state_dict=network.state_dict()), loaded


def _describe(
    path: Path,
    state_dict: Mapping[str, Tensor],
    model: str,
    model_kwargs: Mapping[str, Any] | None,
    class_names: Sequence[str] | None,
    image_size: int | None,
) -> tuple[Checkpoint, Loaded]:
    """`read_weights`, from the content of the file."""
    options, image_size = match_image_size(model, _check_options(model_kwargs), image_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = create_model(model, **options)
        state_dict = match_names(state_dict, network.state_dict())
        classes = _count_classes(network, state_dict, path, model)
        channels = _count_channels(network, state_dict)
        preprocessing = Preprocessing.of(network.pretrained_cfg, image_size, channels)
        if classes != network.num_classes or channels != 3:
            torch.default_generator.manual_seed(0)
            sizes: dict[str, Any] = {"num_classes": classes, **preprocessing.network_options}
            network = create_model(model, **sizes, **options)
    loaded = fit_weights(network, model, path, state_dict)
    if class_names is None:
        class_names = find_class_names(network, classes) or number_classes(classes)
    if len(class_names) != classes:
        raise UsageError(f"{path} has {classes:,} classes, and {len(class_names):,} are named; give one name for each class")
    checkpoint = Checkpoint(path, network.state_dict(), model, options, list(class_names), {}, preprocessing)
    return checkpoint, loaded


def open_model(
    model: str,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
) -> Checkpoint:
    """A checkpoint of `model` as it is initialised, always in the same way, or with the weights that timm publishes for it.

    `num_classes`, `image_size`: by default the model's own. Classes and preprocessing are as for `read_weights`. Raises
    UsageError for an unknown model or option, and if there are no published weights or they cannot be read.
    """
    options, image_size = match_image_size(model, _check_options(model_kwargs), image_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        given: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        if pretrained:
            network = create_pretrained(model, "--pretrained true", "--weights FILE", **given, **options)
        else:
            network = create_model(model, **given, **options)
    classes = int(network.num_classes)
    if classes < 1:
        raise UsageError(f"{model} has no classifier; give the number of classes with --num-classes")
    names = find_class_names(network, classes) or number_classes(classes)
    preprocessing = Preprocessing.of(network.pretrained_cfg, image_size, find_channels(network))
    return Checkpoint(Path(model), network.state_dict(), model, options, names, {}, preprocessing)


def create_pretrained(model: str, asked: str, instead: str, **options: Any) -> TimmNetwork:
    """The network `model` with published weights.

    `asked`: the option that asks for them, as it is typed; `instead`: the option to use if there are none.

    Raises UsageError if no weights are published, and if they cannot be downloaded.
    """
    if not has_pretrained_weights(model):
        raise UsageError(f"{asked}: no weights of {model} are published; use {instead}")
    try:
        return create_model(model, pretrained=True, **options)
    except UsageError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        cause: Exception = error.__cause__
    except Exception as error:  # the libraries that download raise errors of their own
        cause = error
    why = describe_download(cause)
    raise UsageError(f"{asked}: the weights of {model} cannot be downloaded ({why}); use {instead}") from cause


def find_class_names(network: TimmNetwork, classes: int) -> list[str] | None:
    """The names in the network's own config, if it is for so many classes: its labels, or those of ImageNet; None without."""
    cfg = network.pretrained_cfg
    if cfg.get("num_classes") != classes:
        return None
    labels = list(cfg.get("label_names") or ())
    return labels if len(labels) == classes else imagenet_classes(classes)


def _check_options(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Raises UsageError for an option that follows from the weights."""
    options = dict(model_kwargs or {})
    for name in NOT_STORED:
        if name in options:
            raise UsageError(f"--model-kwargs cannot set {name}: it follows from the weights")
    return options


def _count_classes(network: TimmNetwork, state_dict: Mapping[str, Tensor], path: Path, model: str) -> int:
    """The number of outputs of the classifier in `state_dict`, which is from `path`. Raises UsageError if it has none."""
    prefixes = classifier_prefixes(network)
    for name in (f"{prefix}{part}" for prefix in prefixes for part in ("weight", "bias")):
        if name in state_dict and state_dict[name].ndim:
            return len(state_dict[name])
    if not prefixes:
        raise UsageError(f"{model} has no classifier, so there are no classes to evaluate; use another model")
    lacking = f"with a classifier (it lacks {prefixes[0]}weight)"
    if any(name in state_dict for name in network.state_dict()):
        raise UsageError(f"{path} does not hold weights of {model} {lacking}; use a file that has one")
    raise UsageError(f"{path} does not hold the weights of {model} {lacking}; name the network whose weights they are")


def _count_channels(network: TimmNetwork, state_dict: Mapping[str, Tensor]) -> int:
    """The number of input channels of the first convolution in `state_dict`; 3 if it is not there."""
    weights = (state_dict.get(f"{name}.weight") for name in first_convolutions(network))
    return next((weight.shape[1] for weight in weights if weight is not None and weight.ndim == 4), 3)
