"""The files that hold weights: where they are, what they hold, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, is_tensor

from dgnet.documents import parse_json
from dgnet.errors import UsageError, reason
from dgnet.files import replace_file
from dgnet.models import WEIGHTS, find_published, is_published, unwrap_names
from dgnet.paths import expand, find_kind, is_file

DESCRIPTION = "the description of its network"


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Inside the `with` block a UsageError says that the checkpoint `path` is damaged, and in what."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path} is damaged: {error}; use another checkpoint") from None


def save_tensors(state_dict: Mapping[str, Tensor], path: Path, carried: dict[str, Any]) -> None:
    """Write a state dict as safetensors, with the description `carried` as metadata. Raises OSError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with replace_file(path) as written:
        try:
            save_file(tensors, written, metadata={"dgnet": json.dumps(carried)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(reason(error))) from None


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
            f"checkpoint {path} {found}; give a run folder, a .ckpt file, a model.safetensors, or a published network:"
            " local-dir:FOLDER, hf-hub:USER/NAME, or a name that dgnet models --pretrained lists"
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
    if carried is not None and isinstance(content.get("global_step"), int):
        carried = {**carried, STEPS: content["global_step"]}
    return dict(state), carried


STEPS = "steps"
"""In the description that `read_tensors` gives for a .ckpt file of a run: how many steps the run had made."""
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
