"""The command that trains a checkpoint again, from the configuration that it holds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Any

from dgnet.models import Connectivity
from dgnet.options import as_word, flag
from dgnet.typed import hints_of, is_location

# They do not change the result, or are of the machine that trained.
_LEFT_OUT = {
    *("output", "resume", "data_root", "accelerator", "devices", "nodes", "workers", "threads", "checkpoint_every", "loggers"),
    *("cache", "max_bad_images"),
}


def training_command(name: str, kind: type[Any], config: Mapping[str, Any]) -> str:
    """`dgnet NAME` with the options in `config` that are not the defaults of the dataclass `kind`; "" without any.

    Of paths only the last part is kept: the folders are of the machine that trained the network.
    """
    words = []
    hints = hints_of(kind)
    own = {f.name: f.default for f in fields(Connectivity)}  # a run stores the defaults too
    for f in fields(kind):
        value = config.get(f.name, MISSING)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name in _LEFT_OUT or value is MISSING:
            continue
        if f.name == "model_kwargs" and not config.get("dynamic"):
            value = {name: one for name, one in value.items() if name not in own or one != own[name]}
        if value in (default, own.get(f.name, default)):
            continue
        if is_location(hints[f.name]) and isinstance(value, str):
            value = PurePath(value).name
        words.append(f"{flag(f.name)} {shlex.quote(as_word(value))}")
    return " ".join(["dgnet", name, *words]) if words else ""
