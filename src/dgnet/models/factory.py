"""Build models by name, through timm's registry."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import timm
from timm.models import build_model_with_cfg
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph.names import did_you_mean
from dgnet.models.connectivity import Connectivity, DynamicNetwork


def list_models() -> list[str]:
    """The names that dgnet registers with timm."""
    names = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("dgnet.")]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, for dgnet's models and timm's own, with one-line errors.

    `kwargs`: the options of `dgnet.models.Connectivity` (topology, weighting, shortcut, …) and timm's (num_classes,
    drop_path_rate, features_only, checkpoint_path, …). Raises UsageError for an unknown model, option or value.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"unknown model {name!r}{did_you_mean(name, timm.list_models())}; names: dgnet models")
    return timm.create_model(name, **kwargs)


def build_model(
    cls: type[nn.Module], name: str, pretrained: bool, feature_cfg: dict[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """What each registered function calls: timm's builder, with one-line errors."""
    if pretrained:
        raise UsageError(
            f"no pretrained weights are published for {name}; leave out pretrained=True, and start from a file with"
            f" create_model({name!r}, checkpoint_path=FILE) or: dgnet train --model {name} --weights FILE"
        )
    try:
        return build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, **kwargs)
    except TypeError as error:
        raise _explain(error, cls, name) from error


def _explain(error: TypeError, cls: type[nn.Module], name: str) -> Exception:
    """A UsageError where `error` is about an option that the model does not have; `error` itself otherwise."""
    match = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        return error
    options = [f.name for f in fields(Connectivity)] if issubclass(cls, DynamicNetwork) else []
    known = [*options, "num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "zero_init_last"]
    listing = f"; connectivity options: {', '.join(options)}" if options else ""
    return UsageError(f"{name} has no option {match[1]!r}{did_you_mean(match[1], known)}{listing}")
