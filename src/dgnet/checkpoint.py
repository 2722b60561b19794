"""Checkpoints. They hold tensors and plain values only and are loaded with `weights_only`."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pickletools
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, is_tensor, nn

from dgnet.data import Preprocessing, check_max_pixels
from dgnet.documents import parse_json
from dgnet.errors import UsageError, check_choice, check_range, reason
from dgnet.files import replace_file, writing
from dgnet.graph import DynamicGraph, accept_cuts, find_stages
from dgnet.models import (
    WEIGHTS,
    ConvertedNetwork,
    TimmNetwork,
    adapt_input,
    adapt_positions,
    as_words,
    classifier_prefixes,
    create_model,
    describe_loss,
    find_obstacle,
    find_published,
    is_published,
    is_static,
    keep_function,
    load_static_weights,
    match_names,
    missing_options,
    removed_blocks,
    static_counterpart,
    unwrap_names,
)
from dgnet.paths import expand, find_kind, is_file
from dgnet.typed import Label, Location, read_entry, read_fields

CLASSIFY, DETECT = "classify", "detect"
"""The tasks of checkpoints."""

_COMMANDS = {CLASSIFY: "dgnet", DETECT: "dgnet detect"}
_ADVICE = {
    CLASSIFY: "name the model with --model NAME, or start from it with: dgnet train --weights FILE",
    DETECT: "start from it with: dgnet detect train --weights FILE",
}  # for a file of weights only

NOT_STORED = ("num_classes", "in_chans", "pretrained", "checkpoint_path", "features_only")
"""Model options that a checkpoint cannot hold, because they follow from it."""


@dataclass(frozen=True)
class Described:
    """The content of a checkpoint for any task."""

    path: Path
    state_dict: dict[str, Tensor]  # the network's own keys
    model: str
    model_kwargs: dict[str, Any]
    class_names: list[str]
    config: dict[str, Any]  # the run's configuration

    task: ClassVar[str]  # CLASSIFY or DETECT

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a checkpoint from a run folder (its last one), a .ckpt file, or a model.safetensors.

        Raises UsageError for a file that is missing, truncated or damaged, that holds pickled code, or that is no checkpoint
        of dgnet for this task.
        """
        path = find_checkpoint(path)
        return cls.of(path, *read_tensors(path))

    @classmethod
    def of(cls, path: Path, state_dict: dict[str, Tensor], carried: dict[str, Any] | None) -> Self:
        """The checkpoint in the file `path`, whose content `read_tensors` gave. Raises UsageError as `read` does."""
        carried = _check_task(path, carried, cls.task)
        with damaged(path):
            return cls(path=path, state_dict=state_dict, **cls.read_description(carried))

    @classmethod
    def read_description(cls, carried: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that `carried` describes. Raises UsageError for a value that is missing or of another type."""
        kinds = {"model": str, "model_kwargs": dict[str, Any], "class_names": list[Label], "config": dict[str, Any]}
        values = {name: read_entry(carried, name, kind, DESCRIPTION) for name, kind in kinds.items()}
        for name in NOT_STORED:
            if name in values["model_kwargs"]:
                raise UsageError(f"{DESCRIPTION}: model_kwargs sets {name}, which follows from the checkpoint")
        if not values["class_names"]:
            raise UsageError(f"{DESCRIPTION} names no classes")
        return values

    def create_network(self, **options: Any) -> TimmNetwork:
        """The network as described, untrained. Raises UsageError, which names the checkpoint, if it cannot be built."""
        try:
            with accept_cuts():
                return create_model(self.model, **options, **self.model_kwargs)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from None

    def load_into(self, network: nn.Module, misfit: str) -> None:
        """Load the weights. Raises UsageError if they do not fit, which `misfit` says in words, or are not finite."""
        with damaged(self.path):
            difference = load_state(network, self.state_dict)
            if difference:
                raise UsageError(f"its weights {misfit} ({difference})")
            check_finite(self.state_dict)


@dataclass(frozen=True)
class Checkpoint(Described):
    """The content of a checkpoint of `dgnet train`."""

    preprocessing: Preprocessing

    task = CLASSIFY

    @classmethod
    def read_description(cls, carried: Mapping[str, Any]) -> dict[str, Any]:
        values = super().read_description(carried)
        stored = read_entry(carried, "preprocessing", dict[str, Any], DESCRIPTION)
        return {**values, "preprocessing": read_fields(Preprocessing, stored, f"{DESCRIPTION}: preprocessing")}

    @property
    def data(self) -> RunData:
        """Where the images of the run are. Raises UsageError if the checkpoint does not say."""
        return read_run_data(RunData, self)

    def build_network(self) -> TimmNetwork:
        """The trained network, in evaluation mode. Raises UsageError if the weights do not fit the model."""
        network = self.create_network(num_classes=len(self.class_names), **self.preprocessing.network_options)
        self.load_into(network, f"are not those of {self.model}")
        return network.eval()

    def build_dynamic(self) -> TimmNetwork:
        """As `build_network`. Raises UsageError for a static network."""
        network = self.build_network()
        if not find_stages(network):
            raise UsageError(
                f"{self.path} is of {self.model}, a static network: it has no routed edges to analyse;"
                " use a checkpoint of a model whose name begins with dg_, or of a run with --dynamic true"
            )
        return network

    def build_static(self) -> TimmNetwork | None:
        """The static baseline, untrained: the model without `dg_`, with the same classes and sizes. None if there is none."""
        static = static_counterpart(self.model, self.model_kwargs)
        if static is None:
            return None
        name, options = static
        sizes: dict[str, Any] = {"num_classes": len(self.class_names), **self.preprocessing.network_options}
        return create_model(name, **sizes, **options).eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint as a safetensors file. Raises UsageError if the file cannot be written."""
        carried = describe_network(self.model, self.model_kwargs, self.class_names, self.preprocessing, self.config)
        with writing(path, "name another file"):
            save_tensors(self.build_network().state_dict(), path, carried)


D = TypeVar("D")


@dataclass(frozen=True)
class RunData:
    """Where a run of `dgnet train` had its images: the options of the same names. Raises UsageError for other values."""

    data: Location
    val_data: Location | None = None
    data_root: Location = "data"
    holdout: int = 0
    on_bad_image: str = "error"
    max_pixels: float | None = None

    def __post_init__(self) -> None:
        check_range("holdout", self.holdout, 0)
        check_choice("on_bad_image", self.on_bad_image, ("error", "skip"))
        check_max_pixels("max_pixels", self.max_pixels)


def read_run_data(kind: type[D], checkpoint: Described) -> D:
    """What the dataclass `kind` holds of the configuration of a checkpoint's run. Raises UsageError if it is not there."""
    if not checkpoint.config:
        raise UsageError(f"{checkpoint.path} does not say where the data of its run is; name data with --data")
    own = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    with damaged(checkpoint.path):
        stored = {name: value for name, value in checkpoint.config.items() if name in own}
        return read_fields(kind, stored, "the configuration of its run")


DESCRIPTION = "the description of its network"


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Inside the `with` block a UsageError says that the checkpoint `path` is damaged, and in what."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path} is damaged: {error}; use another checkpoint") from None


def check_finite(state_dict: Mapping[str, Tensor]) -> None:
    """Raises UsageError if a tensor holds NaN or infinity."""
    for name, tensor in state_dict.items():
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor  # torch cannot ask float8
        if (tensor.is_floating_point() or tensor.is_complex()) and not values.isfinite().all():
            raise UsageError(f"{name} holds values that are not finite")


def describe_network(
    model: str, model_kwargs: dict[str, Any], class_names: list[str], preprocessing: Preprocessing, config: dict[str, Any]
) -> dict[str, Any]:
    """The description of a network, plain values that a checkpoint stores under the key "dgnet"."""
    return {
        "model": model,
        "model_kwargs": model_kwargs,
        "class_names": class_names,
        "preprocessing": preprocessing.to_dict(),
        "config": config,
    }


def save_tensors(state_dict: Mapping[str, Tensor], path: Path, carried: dict[str, Any]) -> None:
    """Write a state dict as safetensors, with the description `carried` as metadata. Raises OSError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with replace_file(path) as written:
        try:
            save_file(tensors, written, metadata={"dgnet": json.dumps(carried)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(reason(error))) from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of `dgnet train` from a run folder (its last one), a .ckpt file, or a model.safetensors.

    Raises UsageError for a file that is missing, truncated or damaged, that holds pickled code, or that is no checkpoint of
    `dgnet train`.
    """
    return Checkpoint.read(path)


def _check_task(path: Path, carried: dict[str, Any] | None, task: str) -> dict[str, Any]:
    """The description `carried` by a file, which must be for `task`. Raises UsageError if it is not, or if there is none."""
    if carried is None:
        raise UsageError(f"{path} holds weights only, without the model's name and classes; {_ADVICE[task]}")
    own = carried.get("task", CLASSIFY)
    if own not in (CLASSIFY, DETECT):
        raise UsageError(f"{path} is of the unknown task {own!r}; this version has the tasks {CLASSIFY} and {DETECT}")
    if own != task:
        raise UsageError(
            f"{path} is a checkpoint of {_COMMANDS[own]} train, not of {_COMMANDS[task]} train;"
            f" use it with: {_COMMANDS[own]} evaluate"
        )
    return carried


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file of `path`: a file, a run folder, or the name of a published network (local-dir:, hf-hub:, NAME.TAG).

    Raises UsageError if there is none.
    """
    path = expand(path)
    kind = find_kind(path)
    if kind is None and is_published(str(path)):
        return find_published(str(path), WEIGHTS)
    if kind == "folder":
        for candidate in (path / "checkpoints" / "last.ckpt", path / "model.safetensors"):
            if is_file(candidate):
                return candidate
        raise UsageError(f"{path} is no run folder: it contains neither checkpoints/last.ckpt nor model.safetensors")
    if kind != "file":
        found = "does not exist" if kind is None else "is no regular file"
        raise UsageError(
            f"checkpoint {path} {found}; give a run folder, a .ckpt file, a model.safetensors, or a name that"
            " dgnet models --pretrained lists"
        )
    return path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state dict in a checkpoint of dgnet, timm or torchvision, and the description that dgnet's checkpoints have."""
    if _is_safetensors(path):
        return _read_safetensors(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # the options that timm's training stores
        try:
            with path.open("rb") as file:  # of a path torch would read the ending
                content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if _has_pickled_code(path):
                raise UsageError(
                    f"{path} carries pickled code and was not loaded; a checkpoint may hold only tensors and plain values:"
                    " save the state dict, or use safetensors"
                ) from None
            raise _unreadable(path) from None
        except Exception:  # torch may raise anything for such bytes
            raise _unreadable(path) from None
    content = content if isinstance(content, dict) else {}
    carried = content.get("dgnet")
    state = next((content[key] for key in _STATES if isinstance(content.get(key), dict)), content)
    held = [entry for entry in content.values() if isinstance(entry, dict) and entry and all(map(is_tensor, entry.values()))]
    if carried is None and state is content and len(held) == 1:  # under another key
        state = held[0]
    if carried is not None and isinstance(state, dict):
        prefix = "network."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if str(name).startswith(prefix)}
    if not isinstance(state, dict) or not state or not all(map(is_tensor, state.values())):
        raise UsageError(f"{path} holds no state dict; expected a checkpoint of dgnet, timm or torchvision")
    if not all(isinstance(name, str) for name in state):
        raise UsageError(f"{path} holds no state dict: the names of its tensors must be text")
    state = state if carried is not None else unwrap_names(state)
    with damaged(path):
        if carried is not None and not isinstance(carried, dict):
            raise UsageError(f"{DESCRIPTION} is no dict")
    return dict(state), carried


_STATES = ("state_dict_ema", "state_dict", "model")
"""Where checkpoints keep a state dict. timm's training stores averaged weights too, which timm prefers when it loads them."""


def _is_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors: by its content, or if that does not tell, by its ending."""
    start = _read_start(path)
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80")))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            carried = (file.metadata() or {}).get("dgnet")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError):
        raise _unreadable(path) from None
    if not carried:
        return dict(unwrap_names(tensors)), None
    with damaged(path):
        description = parse_json(carried, DESCRIPTION)
        if not isinstance(description, dict):
            raise UsageError(f"{DESCRIPTION} is no dict")
    return tensors, description


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` has loaded."""

    untrained: list[str]
    """The names that keep their initial values: a head of other classes, block gates that the trained network did not have,
    and what a static network lacks."""
    loss: str = ""
    """What is lost of the function of the static network that the weights are of, in words; "" if nothing."""
    resampled: str = ""
    """What timm has resampled because the weights were trained on images of another size, in words; "" if nothing."""


def load_weights(
    network: TimmNetwork, model: str, path: str | Path, start: str = "paper", image_size: tuple[int, int] | None = None
) -> Loaded:
    """Load trained weights into `network`; weights of a static network go to the nodes of its dynamic counterpart.

    `start`: as in `dgnet.load_static_weights`, for the network `model`. The function is compared on images of `image_size`.

    Raises UsageError for weights of another model, and if with `start="static"` the function is not kept.
    """
    path = find_checkpoint(path)
    return fit_weights(network, model, path, *read_tensors(path), start, image_size)


def fit_weights(
    network: TimmNetwork,
    model: str,
    path: Path,
    state_dict: Mapping[str, Tensor],
    carried: dict[str, Any] | None = None,
    start: str = "paper",
    image_size: tuple[int, int] | None = None,
) -> Loaded:
    """As `load_weights`, from the content of the file `path`: its state dict, and the description that dgnet's files have."""
    with damaged(path):
        check_finite(state_dict)
    own = network.state_dict()
    heads = classifier_prefixes(network)
    state_dict = adapt_input(network, match_names(state_dict, own))
    removed = tuple(f"{name}." for name in removed_blocks(network))
    state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith(removed)}
    if isinstance(network, ConvertedNetwork):
        state_dict = dict(network.from_static(state_dict))
    misfits = [n for n in state_dict if n in own and own[n].shape != state_dict[n].shape and not n.startswith(heads)]
    resampled = adapt_positions(network, state_dict, misfits)
    note = ""
    if misfits and len(resampled) == len(misfits):
        state_dict |= resampled
        note = f"resampled {_first(misfits)} for images of another size"
    if is_static(network, state_dict):
        try:
            untrained = load_static_weights(network, state_dict)
        except UsageError as error:
            raise _misfit(path, carried, model, network, str(error)) from None
        weights_of = str((carried or {}).get("model", ""))
        obstacle = find_obstacle(network, weights_of)
        convert = f"--model {model.removeprefix('dg_')} --dynamic true"
        if start == "paper":
            loss = describe_loss(network, image_size, weights_of) if image_size else ""
            return Loaded(untrained, loss and f"{loss}; {convert if obstacle else '--start static'} keeps it", note)
        if obstacle:
            raise UsageError(f"{model} cannot start as the static network: {obstacle}; use {convert}, or --start paper")
        return Loaded(keep_function(network, untrained, image_size), resampled=note)
    if start == "static":
        raise UsageError(f"--start static needs the weights of a static network, and {path} has others; leave out --start")
    reset = find_resized(state_dict, own, heads)
    # A DG-Net that was trained without block gates is fine-tuned to a budget: its gates are new.
    new = [n for n in own if ".node_gates." in n and n not in state_dict]
    difference = load_state(network, {**state_dict, **{name: own[name] for name in (*reset, *new)}})
    if difference:
        raise _misfit(path, carried, model, network, difference)
    return Loaded([*reset, *new], resampled=note)


def find_resized(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> list[str]:
    """The parameters of a head, by the `prefixes` of its names, whose shape differs from that in `own`: of other classes."""
    return [n for n in state_dict if n.startswith(prefixes) and n in own and state_dict[n].shape != own[n].shape]


def _misfit(path: Path, carried: Mapping[str, Any] | None, model: str, network: nn.Module, difference: str) -> UsageError:
    """The error for weights that are not those of `network`, whose name is `model`."""
    if not carried:
        return UsageError(
            f"{path} does not hold the weights of {model} ({difference}); name the network whose weights they are, and its"
            " options"
        )
    if carried.get("model") != model:
        return UsageError(
            f"{path} is a checkpoint of {carried.get('model')}, not of {model} as asked for ({difference}); name its own model"
        )
    stored = carried.get("model_kwargs")
    words = as_words(missing_options(stored, network)) if isinstance(stored, dict) else []
    how = f"add: {shlex.join(words)}" if words else "use the options in the config.yaml of its run"
    return UsageError(f"{path} is of {model} with other options ({difference}); {how}")


def _unreadable(path: Path) -> UsageError:
    """The error for a file that is no checkpoint, which says what it is."""
    start, what = _read_start(path), "truncated or no checkpoint"
    if not start:
        what = "empty"
    elif not any(byte < 32 and byte not in b"\t\r\n" for byte in start):
        what = f"text, not a checkpoint: it begins with {start[:40].decode(errors='replace')!r}"
    another = ", or use another, such as checkpoints/best.ckpt" if path.parent.name == "checkpoints" else ""
    return UsageError(f"{path} is {what}; copy it again{another}")


def _read_start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(200)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None


def load_state(network: nn.Module, state_dict: Mapping[str, Tensor]) -> str:
    """Load a state dict. Returns the first difference from the network's own, in words; "" if there is none.

    If there is a difference, some of the tensors may have been loaded.
    """
    try:
        state_dict = unwrap_names(state_dict)
    except UsageError as error:
        return str(error)
    for name, stage in network.named_modules():
        mask = state_dict.get(f"{name}.mask") if isinstance(stage, DynamicGraph) else None
        if mask is not None and not torch.equal(mask.cpu(), stage.topology.mask):
            return f"{name} has other edges"
    own = network.state_dict()
    for name, tensor in state_dict.items():
        if name in own and own[name].shape != tensor.shape:
            return f"{name} has the shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            return f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers, not floating-point ones"
    try:
        missing, unexpected = network.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:  # from a module of the user's own
        return reason(error)
    if missing:
        return f"it lacks {_first(missing)}"
    return f"it also holds {_first(unexpected)}" if unexpected else ""


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _has_pickled_code(path: Path) -> bool:
    """Whether a file that torch refuses to unpickle refers to functions or classes other than those of tensors."""
    if zipfile.is_zipfile(path):
        try:
            return bool(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except Exception:  # as torch.load, for damaged bytes
            return False
    try:
        with path.open("rb") as file:  # the format of torch up to 1.5: one pickle after another
            while file.peek(1):
                for operation, argument, _ in pickletools.genops(file):
                    module = str(argument).partition(" ")[0]
                    if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and module not in _TENSOR_MODULES):
                        return True
    except Exception:  # pickletools may raise anything for damaged bytes
        return False
    return False


_TENSOR_MODULES = ("torch", "torch._utils", "torch.storage", "collections")
