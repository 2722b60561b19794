"""Published networks: folders with `config.json` and `model.safetensors` in timm's format, also those in this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dgnet.code import import_packages
from dgnet.documents import read_json
from dgnet.errors import UsageError, did_you_mean, reason
from dgnet.paths import expand, is_file, is_folder, list_folder
from dgnet.typed import Label, read_entry, read_value

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a published network."""

_LOCAL, _HUB = "local-dir:", ("hf-hub:", "hf_hub:")
SOURCES = (_LOCAL, *_HUB)
"""What the names of published networks begin with, in timm's form: "local-dir:FOLDER", "hf-hub:USER/NAME"."""

PRETRAINED = Path(__file__).with_name("pretrained")
"""The folder of the published networks in this package."""


@dataclass(frozen=True)
class Published:
    """What the `config.json` of a published network says."""

    architecture: str  # the name of the network
    model_args: dict[str, Any]  # its options
    pretrained_cfg: dict[str, Any]  # timm's description: input size, mean, std, …
    label_names: list[str]  # empty if the classes have no names
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What dgnet adds to timm's format: top1, executed_multiply_adds, command, …"""


def is_published(name: str) -> bool:
    """Whether `name` is a source of published networks, or names weights in this package."""
    return name.startswith(SOURCES) or name in packaged_names()


def expand_source(name: str) -> str:
    """A source with `~` in its folder expanded, which timm does not do. Raises UsageError as `dgnet.paths.expand` does."""
    source, _, where = name.partition(":")
    return f"{_LOCAL}{expand(where)}" if f"{source}:" == _LOCAL and where else name


def find_published(name: str, file: str) -> Path:
    """The path of a file of the published network `name`; from the Hub it is downloaded.

    Raises UsageError if there is no such file, and if the Hub cannot be reached.
    """
    if name in packaged_names():
        return PRETRAINED / name / file
    source, _, where = name.partition(":")
    if not where:
        raise UsageError(f"{name!r} names no network; write local-dir:FOLDER or hf-hub:USER/NAME")
    if f"{source}:" == _LOCAL:
        return _find_local(expand(where), file)
    return _download(where, file)


def _find_local(folder: Path, file: str) -> Path:
    if not is_folder(folder):
        raise UsageError(f"{_LOCAL}{folder}: there is no such folder; publish a run with: dgnet publish RUN --to FOLDER")
    if not is_file(folder / file):
        raise UsageError(
            f"{folder} is no published network: it holds no {file}; publish a run with: dgnet publish RUN --to FOLDER"
        )
    return folder / file


def _download(where: str, file: str) -> Path:
    name, at, revision = where.partition("@")
    check_repo_id(name if revision or not at else where)
    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except RepositoryNotFoundError:
        raise UsageError(f"hf-hub:{where}: the Hub has no such model, or it is private; log in with: hf auth login") from None
    except Exception as error:  # huggingface_hub and the libraries under it raise errors of their own
        why = describe_download(error)
        raise UsageError(f"hf-hub:{where}: {file} cannot be downloaded from the Hugging Face Hub ({why})") from error


def describe_download(error: Exception) -> str:
    """Why a download failed, in words. huggingface_hub reports a missing file if it found neither a connection nor a copy."""
    is_offline = isinstance(error, FileNotFoundError)
    return "no connection, and no copy on this machine" if is_offline else reason(error)


def check_repo_id(name: str) -> None:
    """Raises UsageError if `name` is no USER/NAME of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        fits = False
    else:
        fits = name.count("/") == 1
    if not fits:
        raise UsageError(f"{name!r} is no name of a model on the Hub; write USER/NAME with letters, digits, '-', '_' and '.'")


def read_published(name: str) -> Published:
    """What the `config.json` of the published network `name` says.

    Raises UsageError if it cannot be read, and if it names an unknown network.
    """
    return _read_packaged(name) if name in packaged_names() else _read(name)


@cache
def _read_packaged(name: str) -> Published:
    return _read(name)


def _read(name: str) -> Published:
    path = find_published(name, CONFIG)
    content = read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no description of a network: it holds no JSON object")
    where = str(path)
    architecture = read_entry(content, "architecture", str, where)
    measured = content.get("dgnet", {})
    if not isinstance(measured, dict):
        raise UsageError(f"{where}: dgnet must be a dict, got {measured!r}")
    import_packages(read_value(list[str], measured.get("imports", []), f"{where}: imports"), f"{where}: its network")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise UsageError(f"{path} is of the unknown network {architecture!r}{hint or ';'} a newer dgnet or timm may have it")
    values = {
        name: read_entry(content, name, dict[str, Any], where) for name in ("model_args", "pretrained_cfg") if name in content
    }
    cfg = values.get("pretrained_cfg", {})
    read_value(int | None, content.get("num_classes"), f"{where}: num_classes")
    for name, kind in _CFG.items():
        read_value(kind, cfg.get(name), f"{where}: pretrained_cfg: {name}")
    names = content.get("label_names", cfg.get("label_names"))
    names = list(names.values()) if isinstance(names, dict) else names
    return Published(
        architecture,
        values.get("model_args", {}),
        cfg,
        read_value(list[Label] | None, names, f"{where}: label_names") or [],
        measured,
    )


_CFG: dict[str, Any] = {
    "num_classes": int | None,
    "input_size": tuple[int, int, int] | None,
    "mean": tuple[float, ...] | None,
    "std": tuple[float, ...] | None,
    "interpolation": str | None,
    "crop_pct": float | None,
    "crop_mode": str | None,
}
"""Entries of timm's `pretrained_cfg` that decide what the network sees, and their types. timm itself takes any value."""


@cache
def packaged_names() -> tuple[str, ...]:
    """The names of the networks whose weights are in this package, in timm's form: NAME.TAG."""
    return tuple(folder.name for folder in list_folder(PRETRAINED) if is_file(folder / CONFIG)) if is_folder(PRETRAINED) else ()


@dataclass(frozen=True)
class Pretrained:
    """Weights in this package: what was measured, and how they were trained."""

    name: str
    top1: float  # percent, on `images` test images
    images: int
    parameters: int
    dense_multiply_adds: int  # with every edge open
    executed_multiply_adds: float  # mean over the images
    command: str  # that trained them


def list_pretrained() -> list[Pretrained]:
    """The networks whose weights are in this package."""
    names = [f.name for f in fields(Pretrained) if f.name != "name"]
    return [Pretrained(name, **{key: _read_packaged(name).measured[key] for key in names}) for name in packaged_names()]


def packaged_cfgs(*architectures: str) -> dict[str, dict[str, Any]]:
    """For timm's `generate_default_cfgs`: the configs of the weights in this package for these networks."""
    found = {}
    for name in packaged_names():
        if name.partition(".")[0] in architectures:
            content = read_json(PRETRAINED / name / CONFIG)
            file = str(PRETRAINED / name / WEIGHTS)
            found[name] = {**content["pretrained_cfg"], "file": file, "label_names": content["label_names"]}
    return found


def packaged_options(name: str) -> Mapping[str, Any]:
    """The options of the network NAME.TAG whose weights are in this package; none if there are no such weights."""
    return _read_packaged(name).model_args if name in packaged_names() else MappingProxyType({})
