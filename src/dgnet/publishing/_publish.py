"""Publish a trained network in timm's format: `config.json`, `model.safetensors` and a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgnet._cost import cost
from dgnet._entries import CONVERTED, DETECTOR
from dgnet._version import __version__
from dgnet.checkpoint import DETECT, Checkpoint, describe_network, find_checkpoint, read_tensors, save_tensors
from dgnet.detection import DetectConfig, DetectorCheckpoint, describe_detector
from dgnet.errors import UsageError, reason
from dgnet.files import read_table, replace_file, to_json, writing
from dgnet.models import CONFIG, WEIGHTS, check_repo_id, stored_options
from dgnet.paths import expand, find_kind, is_file, list_folder
from dgnet.publishing._card import Card, write_card
from dgnet.publishing._command import training_command
from dgnet.training import TrainConfig

README = "README.md"


@dataclass(frozen=True)
class Publication:
    """What `publish` has written."""

    source: str  # to load it from: "local-dir:FOLDER" or "hf-hub:USER/NAME"
    task: str  # "classify" or "detect"


_HUB = "hf-hub:"
_MEASURED = ("top1", "top5", "images", "dense_multiply_adds", "executed_multiply_adds", "distinct_wirings", "AP", "AP50")
"""Figures of `dgnet evaluate --json` and `dgnet detect evaluate --json` that are published."""


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
    that `dgnet evaluate RUN --json` prints; by default the last row of the run's metrics.csv is used. `license`: of the
    weights, such as "apache-2.0". `private`: whether a new repository on the Hub is.

    The weights are written as safetensors only. A folder may hold an older publication, which is replaced, but no other files.

    Raises UsageError for a checkpoint that cannot be read, a folder that holds other files, and a name that the Hub does not
    allow, and if the Hub cannot be reached or refuses.
    """
    name = str(to).removeprefix(_HUB) if str(to).startswith(_HUB) else None
    if name is None:
        _check_folder(expand(to))
    else:
        check_repo_id(name)
    path = find_checkpoint(run)
    state_dict, carried = read_tensors(path)
    kind: type[Checkpoint | DetectorCheckpoint] = DetectorCheckpoint if (carried or {}).get("task") == DETECT else Checkpoint
    checkpoint = kind.of(path, state_dict, carried)
    measured = _measure(path, evaluation)
    if name is None:
        folder = expand(to)
        with writing(folder, "name another folder with --to"):
            folder.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, folder, measured, license, f"local-dir:{folder}", folder.name or checkpoint.model)
        return Publication(f"local-dir:{folder}", checkpoint.task)
    with tempfile.TemporaryDirectory() as temporary:
        _write(checkpoint, Path(temporary), measured, license, f"{_HUB}{name}", name.partition("/")[2])
        _upload(Path(temporary), name, private)
    return Publication(f"{_HUB}{name}", checkpoint.task)


def _check_folder(folder: Path) -> None:
    kind = find_kind(folder)
    if kind is None:
        return
    if kind != "folder":
        raise UsageError(f"--to {folder} is no folder; name another")
    others = [entry.name for entry in list_folder(folder) if entry.name not in (CONFIG, WEIGHTS, README)]
    if others:
        raise UsageError(f"--to {folder} holds other files ({others[0]}); name a new or empty folder")


def _measure(path: Path, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figures of the trained network that are known."""
    if evaluation is not None:
        known = {name: evaluation[name] for name in _MEASURED if isinstance(evaluation.get(name), int | float)}
        if not known:
            raise UsageError(f"the evaluation holds none of {', '.join(_MEASURED)}; write it with: dgnet evaluate RUN --json")
        return known
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    table = folder / "metrics.csv"
    rows = [row for row in read_table(table) if row.get("val_top1")] if is_file(table) else []
    return {"top1": float(rows[-1]["val_top1"]), "top5": float(rows[-1]["val_top5"])} if rows else {}


def _write(
    checkpoint: Checkpoint | DetectorCheckpoint,
    folder: Path,
    measured: dict[str, Any],
    license: str | None,
    load: str,
    title: str,
) -> None:
    kind: type[Any] = TrainConfig
    if isinstance(checkpoint, DetectorCheckpoint):
        kind = DetectConfig
        config, state, described = _describe_detector(checkpoint)
    else:
        config, state, described = _describe_classifier(checkpoint, measured)
    command = training_command(kind.command, kind, checkpoint.config)
    if license:
        config["pretrained_cfg"]["license"] = license
    else:
        config["pretrained_cfg"].pop("license", None)  # timm's is that of the network's own weights
    config["dgnet"] = {"version": __version__, **measured, "command": command}
    is_detector = isinstance(checkpoint, DetectorCheckpoint)
    network = f"{checkpoint.model}, made dynamic" if checkpoint.model_kwargs.get("dynamic") else checkpoint.model
    card = Card(title, is_detector, network, checkpoint.class_names, _in_words(measured), load, command, license)
    for name, text in ((CONFIG, to_json(config, indent=2) + "\n"), (README, write_card(card))):
        with replace_file(folder / name) as written:
            written.write_text(text, encoding="utf-8")
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
    described = describe_network(checkpoint.model, checkpoint.model_kwargs, checkpoint.class_names, what, config={})
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
    )
    return config, detector.state_dict(), described


def _in_words(measured: Mapping[str, Any]) -> dict[str, str]:
    """The figures for a reader, with units."""
    words = {
        "top1": ("top-1", "{:.2f} %"),
        "top5": ("top-5", "{:.2f} %"),
        "AP": ("AP", "{:.2f}"),
        "AP50": ("AP50", "{:.2f}"),
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
