"""Publish a trained network in timm's format: `config.json`, `model.safetensors` and a model card."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgnet._cost import cost
from dgnet._entries import CONVERTED, DETECTOR
from dgnet._version import __version__
from dgnet.checkpoint import DETECT, IMPORTS, STEPS, Checkpoint, describe_network, find_checkpoint, read_tensors, save_tensors
from dgnet.detection import DetectConfig, DetectorCheckpoint, describe_detector
from dgnet.errors import UsageError, check_range, reason, shorten
from dgnet.files import lock, part_of, read_table, replace_file, to_json, writing
from dgnet.models import (
    CONFIG,
    SOURCES,
    WEIGHTS,
    check_repo_id,
    find_published,
    is_published,
    read_published,
    stored_options,
)
from dgnet.paths import expand, find_kind, is_file, list_folder
from dgnet.publishing._card import Card, write_card
from dgnet.publishing._command import training_command
from dgnet.training import TrainConfig
from dgnet.typed import Location, read_value

README, METRICS = "README.md", "metrics.csv"


@dataclass(frozen=True)
class Publication:
    """What `publish` has written."""

    source: str  # to load it from: "local-dir:FOLDER" or "hf-hub:USER/NAME"
    task: str  # "classify" or "detect"


_LOCAL, _HUB = "local-dir:", "hf-hub:"
_MOST = 1e30
_MEASURED: dict[str, tuple[type, float]] = {
    "top1": (float, 100),
    "top5": (float, 100),
    "ap": (float, 100),
    "ap50": (float, 100),
    "images": (int, _MOST),
    "dense_multiply_adds": (int, _MOST),
    "executed_multiply_adds": (float, _MOST),
    "distinct_wirings": (int, _MOST),
}
"""Figures of `dgnet evaluate --json` and `dgnet detect evaluate --json` that are published: type, and largest value."""


def publish(
    run: str | Path,
    to: str | Path,
    *,
    evaluation: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool = False,
) -> Publication:
    """Publish the network of a checkpoint, for classification or detection.

    `run`: a run folder, a checkpoint, or a published network. `to`: a folder, or "hf-hub:USER/NAME". `evaluation`: the document
    that `dgnet evaluate RUN --json` prints; by default the run's metrics.csv is used, its row for these weights. `license`: of
    the weights, such as "apache-2.0". `private`: whether a new repository on the Hub is.

    The weights are written as safetensors only. A folder may hold an older publication, which is replaced, but no other files.
    What is known of a network that was published before (figures, command, license) is kept.

    Raises UsageError for a checkpoint that cannot be read, a folder that holds other files, and a name that the Hub does not
    allow, and if the Hub cannot be reached or refuses.
    """
    source, where = _read_target(to)
    name = where if source == _HUB else None
    if name is not None:
        check_repo_id(name)
    else:
        _check_folder(expand(where))
        if private:
            raise UsageError(f"--private is for a repository on the Hub, and --to {where} is a folder; leave it out")
    license = read_value(str | None, license, "license")
    if license is not None and len(license.splitlines()) > 1:
        raise UsageError(f"license must be one line, such as apache-2.0, got {license[:60]!r}")
    path = find_checkpoint(run)
    state_dict, carried = read_tensors(path)
    if carried is None:
        raise UsageError(f"{path} holds weights only, without the model's name and classes; publish a checkpoint of dgnet")
    kind: type[Checkpoint | DetectorCheckpoint] = DetectorCheckpoint if carried.get("task") == DETECT else Checkpoint
    checkpoint = kind.of(path, state_dict, carried)
    about = _About(
        _measure(path, carried.get(STEPS)) if evaluation is None else _read_evaluation(evaluation, "the evaluation"),
        training_command(_config_of(kind).command, _config_of(kind), checkpoint.config),
        license,
    )
    about = _complete(about, run, path, has_figures=evaluation is not None)
    if name is None:
        folder = expand(where)
        with writing(folder, "name another folder with --to"):
            folder.mkdir(parents=True, exist_ok=True)
            with lock(folder, f"--to {folder}: another process publishes there now; wait for it, or name another folder"):
                title = folder.name or checkpoint.model
                _write(checkpoint, folder, about, f"{_LOCAL}{folder.name or 'FOLDER'}", title)
        return Publication(f"{_LOCAL}{folder}", checkpoint.task)
    with tempfile.TemporaryDirectory() as temporary:
        _write(checkpoint, Path(temporary), about, f"{_HUB}{name}", name.partition("/")[2])
        _upload(Path(temporary), name, private)
    return Publication(f"{_HUB}{name}", checkpoint.task)


@dataclass(frozen=True)
class _About:
    """What is known of the trained network."""

    measured: dict[str, Any]  # its figures
    command: str  # that trains it again; "" if it is not known
    license: str | None  # of its weights


def _config_of(kind: type[Checkpoint | DetectorCheckpoint]) -> type[Any]:
    """The configuration of the runs that write such checkpoints."""
    return DetectConfig if kind is DetectorCheckpoint else TrainConfig


def _read_target(to: str | Path) -> tuple[str, str]:
    """From where to publish to: "hf-hub:" and a name, or "local-dir:" and a folder."""
    where = str(read_value(Location, to, "--to"))
    source = next((source for source in SOURCES if where.lower().startswith(source)), "")
    scheme = re.match(r"[\w+.-]+:/+(?=\w)", where)  # a Path has one slash after the colon
    if (source and not where.startswith(source)) or (scheme and len(scheme[0]) > 3 and not source):
        raise UsageError(f"--to {where} is neither a folder nor hf-hub:USER/NAME; for a folder of this name write ./{where}")
    rest = where.removeprefix(source)
    if source == _LOCAL and not rest:
        raise UsageError(f"--to {where} names nothing; write local-dir:FOLDER or hf-hub:USER/NAME")
    return (_LOCAL if source in ("", _LOCAL) else _HUB), rest


def _check_folder(folder: Path) -> None:
    if not str(folder).isprintable():
        raise UsageError(f"--to {str(folder)!r} holds characters that cannot be printed; name another folder")
    kind = find_kind(folder)
    if kind is None:
        return
    if kind != "folder":
        raise UsageError(f"--to {folder} is no folder; name another")
    own = {CONFIG, WEIGHTS, README}
    own |= {part_of(folder / name).name for name in own}  # a process that was killed may leave some
    others = [entry.name for entry in list_folder(folder) if entry.name not in own]
    if others:
        raise UsageError(f"--to {folder} holds other files ({others[0]}); name a new or empty folder")


def _read_evaluation(evaluation: object, where: str) -> dict[str, Any]:
    """The figures in the output of `dgnet evaluate --json`. Raises UsageError for another document, and for other values."""
    if not isinstance(evaluation, Mapping):
        raise UsageError(f"{where} is no JSON object; write it with: dgnet evaluate RUN --json")
    known = {}
    for name, (kind, most) in _MEASURED.items():
        value = read_value(kind | None, evaluation.get(name), f"{where}: {name}")
        if value is not None:
            check_range(f"{where}: {name}", value, 0, most)
            known[name] = value
    if not known:
        raise UsageError(f"{where} holds none of {', '.join(_MEASURED)}; write it with: dgnet evaluate RUN --json")
    return known


def _measure(path: Path, steps: int | None) -> dict[str, Any]:
    """The figures in a run's metrics.csv of the weights in the file `path`, which the run had after `steps` steps.

    None: those of its last row, for the run's model.safetensors. Other checkpoints may be older, such as best.ckpt, or newer.
    """
    table = (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / METRICS
    rows = read_table(table) if is_file(table) else []
    found: dict[str, Any] = {}
    for row in rows:
        values = {name: _read_number(row.get(f"val_{name}"), table) for name in ("top1", "top5", "ap", "ap50")}
        if steps is None or _read_number(row.get("step"), table) == steps - 1:
            found = {name: value for name, value in values.items() if math.isfinite(value)} or found
    return found


def _read_number(cell: str | None, table: Path) -> float:
    """The number in a cell of a table; NaN if it is empty, or if there is no such column."""
    try:
        return float(cell or "nan")
    except ValueError:
        raise UsageError(f"{table} holds {shorten(cell or '', 60)!r}, no number; give the figures with --evaluation") from None


def _complete(about: _About, run: str | Path, path: Path, has_figures: bool) -> _About:
    """`about` with what `config.json` says, if the weights in the file `path` were published before.

    `has_figures`: whether the user gave new figures, which replace all old ones.
    """
    folder = path.parent / CONFIG
    if is_published(str(run)) and find_kind(run) is None:
        name = str(run)
    elif path.name == WEIGHTS and is_file(folder):
        name = f"{_LOCAL}{path.parent}"
    else:
        return about
    earlier = read_published(name)
    known = {name: earlier.measured[name] for name in _MEASURED if name in earlier.measured}
    where = f"{find_published(name, CONFIG)}: dgnet"
    measured = about.measured or ({} if has_figures or not known else _read_evaluation(known, where))
    command = about.command or read_value(str | None, earlier.measured.get("command") or None, f"{where}: command") or ""
    license = about.license or read_value(str | None, earlier.pretrained_cfg.get("license") or None, f"{where}: license")
    return _About(measured, command, license)


def _write(checkpoint: Checkpoint | DetectorCheckpoint, folder: Path, about: _About, load: str, title: str) -> None:
    """Write the three files. If one cannot be written, the folder stays as it is."""
    measured = dict(about.measured)
    is_detector = isinstance(checkpoint, DetectorCheckpoint)
    if isinstance(checkpoint, DetectorCheckpoint):
        config, state, described = _describe_detector(checkpoint)
    else:
        config, state, described = _describe_classifier(checkpoint, measured)
    if about.license:
        config["pretrained_cfg"]["license"] = about.license
    else:
        config["pretrained_cfg"].pop("license", None)  # timm's is that of the network's own weights
    config["dgnet"] = {"version": __version__, **measured, "command": about.command}
    if checkpoint.imports:
        config["dgnet"][IMPORTS] = checkpoint.imports
    network = f"{checkpoint.model}, made dynamic" if checkpoint.model_kwargs.get("dynamic") else checkpoint.model
    card = write_card(
        Card(title, is_detector, network, checkpoint.class_names, _in_words(measured), load, about.command, about.license)
    )
    with replace_file(folder / CONFIG) as new_config, replace_file(folder / README) as new_card:
        new_config.write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
        new_card.write_text(card, encoding="utf-8")
        save_tensors(state, folder / WEIGHTS, described)


def _describe_classifier(
    checkpoint: Checkpoint, measured: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`config.json` in timm's format, the state dict, and the description that dgnet's checkpoints have."""
    network = checkpoint.build_network()
    what = checkpoint.preprocessing
    counted = cost(network, what.image_size)
    measured.update(parameters=counted.params, multiply_adds=counted.multiply_adds)
    options = stored_options(network, checkpoint.model_kwargs)
    is_converted = options.pop("dynamic", False)
    architecture, model_args = (
        (CONVERTED, {"base": checkpoint.model, **options}) if is_converted else (checkpoint.model, options)
    )
    own = network.pretrained_cfg
    cfg = {
        name: own.get(name)
        for name in ("pool_size", "first_conv", "classifier", "fixed_input_size", "license", "min_input_size")
    }
    cfg |= {name: value for name, value in what.to_dict().items() if name != "image_size"}
    cfg |= {"input_size": list(what.input_shape), "num_classes": len(checkpoint.class_names)}
    architecture, _, tag = architecture.partition(".")
    config = {
        "architecture": architecture,
        "num_classes": len(checkpoint.class_names),
        "num_features": network.num_features,
        "label_names": checkpoint.class_names,
        "model_args": model_args,
        "pretrained_cfg": {**cfg, **({"tag": tag} if tag else {})},
    }
    described = describe_network(
        checkpoint.model, checkpoint.model_kwargs, checkpoint.class_names, what, config={}, imports=checkpoint.imports
    )
    return config, network.state_dict(), described


def _describe_detector(checkpoint: DetectorCheckpoint) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """As `_describe_classifier`."""
    detector = checkpoint.build()
    model_args = {
        "network": checkpoint.model,
        "network_args": checkpoint.model_kwargs,
        "num_classes": len(checkpoint.class_names),
        "detector": checkpoint.detector,
    }
    config = {
        "architecture": DETECTOR,
        "num_classes": len(checkpoint.class_names),
        "label_names": checkpoint.class_names,
        "model_args": model_args,
        "pretrained_cfg": {"num_classes": len(checkpoint.class_names)},
    }
    described = describe_detector(
        checkpoint.model,
        checkpoint.model_kwargs,
        checkpoint.class_names,
        checkpoint.category_ids,
        checkpoint.detector,
        config={},
        imports=checkpoint.imports,
    )
    return config, detector.state_dict(), described


def _in_words(measured: Mapping[str, Any]) -> dict[str, str]:
    """The figures for a reader, with units."""
    words = {
        "top1": ("top-1", "{:.2f} %"),
        "top5": ("top-5", "{:.2f} %"),
        "ap": ("AP", "{:.2f}"),
        "ap50": ("AP50", "{:.2f}"),
        "images": ("evaluated on", "{:,} images"),
        "parameters": ("parameters", "{:,}"),
        "multiply_adds": ("multiply-adds of convolutions", "{:,}"),
        "dense_multiply_adds": ("multiply-adds with every edge open", "{:,.0f}"),
        "executed_multiply_adds": ("multiply-adds executed, mean over the images", "{:,.0f}"),
        "distinct_wirings": ("distinct wirings", "{:,}"),
    }
    return {word: form.format(measured[name]) for name, (word, form) in words.items() if name in measured}


def _upload(folder: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Publish with dgnet {__version__}")
    except Exception as error:  # huggingface_hub and the libraries under it raise errors of their own
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = "; log in with: hf auth login" if status in (401, 403) else ""
        raise UsageError(
            f"{_HUB}{name} cannot be published: {reason(error)}{advice}; to write a folder instead: --to FOLDER"
        ) from error
