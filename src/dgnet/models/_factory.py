"""Build models by name, through timm's registry."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any, cast

import timm
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, load_checkpoint, resolve_pretrained_cfg
from torch import nn

from dgnet.code import list_packages
from dgnet.code import trust_code as trusting
from dgnet.errors import UnknownOptionError, UsageError, check_range, did_you_mean, reason, shorten
from dgnet.graph import find_stages
from dgnet.models._connectivity import Connectivity
from dgnet.models._convert import convert
from dgnet.models._dynamic import DynamicNetwork
from dgnet.models._protocol import TimmNetwork
from dgnet.models._published import SOURCES, expand_source, packaged_names, packaged_options, read_published
from dgnet.models._shorten import remove_blocks
from dgnet.models._state import check_finite, unwrap_names
from dgnet.paths import find_kind
from dgnet.presets import expand_preset
from dgnet.typed import read_value


def list_models(filter: str = "*") -> list[str]:
    """The names that dgnet registers with timm. `filter`: a pattern that they match, such as "dg_*".

    Raises UsageError if `filter` is no text.
    """
    if not isinstance(filter, str):
        raise UsageError(f"the filter of a list of models is a pattern such as 'dg_*', got {filter!r}")
    names = [name for name in timm.list_models(filter) if timm.model_entrypoint(name).__module__.startswith("dgnet.models.")]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def create_model(name: str, *, preset: str | None = None, trust_code: str | Sequence[str] = (), **kwargs: Any) -> TimmNetwork:
    """`timm.create_model`, for dgnet's models and timm's own, with one-line errors.

    `name`: a registered name, also with the tag of published weights (NAME.TAG), or a source in timm's form:
    "local-dir:FOLDER", "hf-hub:USER/NAME". A source has the published weights, unless `pretrained=False`.
    `kwargs`: the options of `dgnet.models.Connectivity` (topology, weighting, shortcut, …) and timm's (num_classes,
    drop_path_rate, features_only, checkpoint_path, …). With `dynamic=True` timm's network is converted: further options are
    those of `dgnet.convert` (stages, …). `preset`: a name of `dgnet.presets`, such as "skipnet", for connectivity in the form
    of another network; a static network is converted. `without_blocks`: names of residual blocks to leave out. `trust_code`:
    packages whose code may be imported if an option, also one in a source's `config.json`, names a class of theirs
    ("package.module.Class").

    Raises UsageError for an unknown model, option or value.
    """
    if not isinstance(name, str):
        raise UsageError(f"a model is given by its name, got {name!r}; see: dgnet models")
    kwargs = expand_preset(name, preset, kwargs)
    architecture = name.partition(".")[0]
    is_known = timm.is_model(architecture)
    is_source = name.startswith(SOURCES)
    if is_source:
        name = expand_source(name)
        with trusting(trust_code):
            read_published(name)
        kwargs = {"pretrained": True, **kwargs}
    elif not is_known:
        shown = repr(name) if len(name) <= 60 else f"{name[:60]!r}…"
        raise UsageError(f"unknown model {shown}{did_you_mean(name, timm.list_models())}; see: dgnet models")
    for rate in ("drop_rate", "drop_path_rate", "drop_block_rate"):
        if kwargs.get(rate) is not None:
            check_range(rate, kwargs[rate], 0, 1)
    built = {option: value for option, value in kwargs.items() if option != "checkpoint_path"}
    without = read_value(list[str], built.pop("without_blocks", []), "without_blocks")
    conversion = _take_conversion(name, built)
    try:
        with trusting(trust_code):
            network = timm.create_model(name, **built)
            network = remove_blocks(network, without) if without else network
            if conversion is not None:
                if find_stages(network):
                    raise UsageError(f"dynamic=True converts a static network, and {name} is dynamic already; leave it out")
                network = convert(network, **conversion)
        if is_source and kwargs["pretrained"]:
            _check_loaded(name, network)
        if kwargs.get("checkpoint_path"):
            load_checkpoint(network, kwargs["checkpoint_path"], filter_fn=take_state)
        return cast(TimmNetwork, network)
    except UsageError:
        raise
    except _BAD_VALUE as error:
        if isinstance(error, TypeError) and is_known:  # perhaps an option that timm's network does not have
            network = inspect.signature(timm.model_entrypoint(architecture)).return_annotation
            _check_options(name, network, built, is_converted=conversion is not None)
        given = shorten(", ".join(f"{key}={' '.join(repr(value).split())[:60]}" for key, value in kwargs.items()))
        raise UsageError(
            f"{name} cannot be built with {given or 'its defaults'}: {type(error).__name__}: {reason(error)}"
        ) from error


def _check_loaded(name: str, network: nn.Module) -> None:
    """Raises UsageError if the weights of the published network `name` are not finite: timm does not look."""
    try:
        check_finite(network.state_dict())
    except UsageError as error:
        raise UsageError(f"the weights of {name} are damaged: {error}; publish it again, or download it again") from None


def _take_conversion(name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the arguments of `convert` from `options` and return them; None if the network is not to be converted."""
    if not read_value(bool, options.pop("dynamic", False), "dynamic"):
        return None
    given = {option: options.pop(option) for option in _conversion_options() if option in options}
    return {**given, "image_size": options.get("img_size")}


def build_model(
    cls: type[nn.Module], name: str, pretrained: bool, feature_cfg: dict[str, Any] | None = None, **kwargs: Any
) -> TimmNetwork:
    """timm's builder, with checks; each registered function calls it.

    Raises UnknownOptionError for an option that `cls` does not have, and UsageError for `pretrained` where the configuration
    names no weights.
    """
    if pretrained and not has_pretrained_weights(name, kwargs):
        raise UsageError(
            f"no pretrained weights are published for {name}; leave out pretrained=True, and start from a file with"
            f" create_model({name!r}, checkpoint_path=FILE) or: dgnet train --model {name} --weights FILE;"
            " networks that have weights: dgnet models --pretrained"
        )
    kwargs = {**_published_options(name, pretrained, kwargs), **kwargs}
    _check_options(name, cls, kwargs)
    built = build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=take_state, **kwargs)
    return cast(TimmNetwork, built)


def _published_options(name: str, pretrained: bool, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the weights in this package that are asked for, by their tag or as the network's default ones.

    `given`: what timm's builder is given. If that names other weights, there are no such options.
    """
    cfg = given.get("pretrained_cfg")
    if isinstance(cfg, str):
        return packaged_options(f"{name}.{cfg}")
    is_default = pretrained and cfg is None and not given.get("pretrained_cfg_overlay")
    return packaged_options(f"{name}.{resolve_pretrained_cfg(name).tag}") if is_default else {}


def take_state(state_dict: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """What timm's loaders call on the content of a file: a state dict without the prefixes of wrappers."""
    return dict(unwrap_names(state_dict))


def has_pretrained_weights(name: str, options: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether timm's configuration for a network, with the user's changes in `options`, says where weights are.

    Raises UsageError if they are in a file that is not there.
    """
    if name.startswith(SOURCES):
        return True
    try:
        cfg = resolve_pretrained_cfg(name, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay"))
    except RuntimeError:
        tags = [named for named in packaged_names() if named.startswith(f"{name}.")]
        known = f"; there are {', '.join(tags)}" if tags else ""
        raise UsageError(f"there are no weights {name}.{options.get('pretrained_cfg')}{known}") from None
    if cfg.file and find_kind(cfg.file) not in ("file", "folder"):  # a folder: "local-dir:FOLDER"
        raise UsageError(f"the pretrained weights of {name} should be in {cfg.file}, which does not exist")
    return bool(cfg.has_weights or cfg.state_dict)


def static_counterpart(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The static network of a dynamic one: its name, and those of the `options` that it has. None if there is none."""
    static = name.removeprefix("dg_")
    is_converted = options.get("dynamic", False)
    if not is_converted and (static == name or not timm.is_model(static)):
        return None
    dynamic = {"dynamic", *_conversion_options()}
    return static, {option: value for option, value in options.items() if option not in dynamic}


def needed_packages(name: str, imports: str | None) -> list[str]:
    """The packages in `imports`, separated by commas, if the network `name` is of none but the user's own; otherwise none.

    A class of theirs that an option names is found without them, by its import path.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):  # a source, whose config.json says what it needs
        return []
    module = timm.model_entrypoint(architecture).__module__
    return [] if module.partition(".")[0] in ("timm", "dgnet") else list_packages(imports, "--import")


def _conversion_options() -> tuple[str, ...]:
    """The options of a dynamic network that its static form does not have."""
    return "stages", *Connectivity.names()


def imagenet_cfg(**names: Any) -> dict[str, Any]:
    """A default config for timm: ImageNet at 224 pixels, as the paper evaluates it (§6.1). `names`: first_conv, classifier."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        **names,
    }


# What a constructor may raise for a value that it cannot use.
_BAD_VALUE = (
    TypeError,
    ValueError,
    AssertionError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    OSError,
    SafetensorError,
    UnpicklingError,
)
# Options that timm's builder takes and does not pass to the network.
_BUILDER_OPTIONS = {*inspect.signature(build_model_with_cfg).parameters, "features_only", "out_indices", "feature_cls"}


def _check_options(name: str, network: Any, options: Mapping[str, Any], is_converted: bool = False) -> None:
    """Raises UnknownOptionError for the first of `options` that a class of networks does not have.

    Raises UsageError if an option that dgnet's own classes have as true or false is something else.
    """
    if not inspect.isclass(network):
        return
    connectivity = Connectivity.names()
    is_dynamic = is_converted or issubclass(network, DynamicNetwork)
    arguments = {argument for base in network.__mro__[:-1] for argument in inspect.signature(base).parameters}
    arguments -= {"self", "args", "kwargs", "options"}
    known = [*(connectivity if is_dynamic else []), *sorted(arguments)]
    unknown = (option for option, value in options.items() if value is not None and option not in {*known, *_BUILDER_OPTIONS})
    option = next(unknown, None)
    if option is None:
        own = [base for base in network.__mro__ if base.__module__.partition(".")[0] == "dgnet"]
        for argument in (argument for base in own for argument in inspect.signature(base).parameters.values()):
            if isinstance(argument.default, bool) and argument.name in options:
                read_value(bool | None, options[argument.name], argument.name)
        return
    hint = did_you_mean(option, known)
    line = f"{name} has no option {option!r}{hint}; its options are those of {network.__module__}.{network.__qualname__}"
    if is_dynamic:
        line = f"{name} has no option {option!r}{hint}; connectivity options: {', '.join(connectivity)}"
    elif option in connectivity and not getattr(network, "has_own_graphs", False):
        dynamic = f"dg_{name}" if timm.is_model(f"dg_{name}") else "a dg_ model"
        line = f"{name} is static and has no option {option!r}; use {dynamic}, see: dgnet models"
    raise UnknownOptionError(line, option)
