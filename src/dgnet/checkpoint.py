"""Checkpoints. They hold tensors and plain values only and are loaded with `weights_only`."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dgnet.data import Preprocessing
from dgnet.errors import UsageError, reason
from dgnet.files import replace_file, writing
from dgnet.graph import DynamicGraph, find_stages
from dgnet.models import Connectivity, TimmNetwork, classifier_prefixes, create_model, is_static, load_static_weights

CLASSIFY, DETECT = "classify", "detect"
"""The tasks of checkpoints."""

_COMMANDS = {CLASSIFY: "dgnet", DETECT: "dgnet detect"}


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
        path, state_dict, carried = read_described(path, cls.task)
        try:
            return cls(
                path=path,
                state_dict=state_dict,
                model=str(carried["model"]),
                model_kwargs=dict(carried["model_kwargs"]),
                class_names=[str(name) for name in carried["class_names"]],
                config=dict(carried["config"]),
                **cls.read_own(carried),
            )
        except KeyError as error:
            fault = f"lacks {error}"
        except (TypeError, ValueError) as error:
            fault = f"cannot be read ({reason(error)})"
        raise UsageError(f"{path} is damaged: the description of its network {fault}; use another checkpoint")

    def load_into(self, network: nn.Module, misfit: str) -> None:
        """Load the weights. Raises UsageError if they do not fit; `misfit`: how the message says so."""
        difference = load_state(network, self.state_dict)
        if difference:
            raise UsageError(f"{self.path} is damaged: its weights {misfit} ({difference}); use another checkpoint")

    @staticmethod
    def read_own(carried: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that only this kind of checkpoint has. Raises KeyError, TypeError or ValueError if they are damaged."""
        raise NotImplementedError


@dataclass(frozen=True)
class Checkpoint(Described):
    """The content of a checkpoint of `dgnet train`."""

    preprocessing: Preprocessing

    task = CLASSIFY

    @staticmethod
    def read_own(carried: Mapping[str, Any]) -> dict[str, Any]:
        return {"preprocessing": Preprocessing.from_dict(carried["preprocessing"])}

    def build_network(self) -> TimmNetwork:
        """The trained network, in evaluation mode. Raises UsageError if the weights do not fit the model."""
        network = create_model(self.model, num_classes=len(self.class_names), **self.model_kwargs)
        self.load_into(network, f"are not those of {self.model}")
        return network.eval()

    def build_dynamic(self) -> TimmNetwork:
        """As `build_network`. Raises UsageError for a static network."""
        network = self.build_network()
        if not find_stages(network):
            raise UsageError(
                f"{self.path} is of {self.model}, a static network: it has no routed edges to analyse;"
                " use a checkpoint of a model whose name begins with dg_"
            )
        return network

    def build_static(self) -> TimmNetwork | None:
        """The static baseline, untrained: the model without `dg_`, with the same classes and sizes. None if there is none."""
        name = self.model.removeprefix("dg_")
        if name == self.model or not timm.is_model(name):
            return None
        connectivity = Connectivity.names()
        options = {option: value for option, value in self.model_kwargs.items() if option not in connectivity}
        return create_model(name, num_classes=len(self.class_names), **options).eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint as a safetensors file. Raises UsageError if the file cannot be written."""
        carried = describe_network(self.model, self.model_kwargs, self.class_names, self.preprocessing, self.config)
        with writing(path, "name another file"):
            save_tensors(self.build_network().state_dict(), path, carried)


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


def read_described(path: str | Path, task: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The checkpoint file of `path`, its state dict, and its description. `task`: the task that it must be for.

    Raises UsageError for a file that is missing or truncated, that holds pickled code, or that is no checkpoint of dgnet for
    `task`.
    """
    path = find_checkpoint(Path(path))
    state_dict, carried = read_tensors(path)
    if carried is None:
        raise UsageError(
            f"{path} holds weights only, without the model's name and classes; use it with:"
            f" {_COMMANDS[task]} train --weights {path}"
        )
    own = carried.get("task", CLASSIFY)
    if own != task:
        raise UsageError(
            f"{path} is a checkpoint of {_COMMANDS.get(own, own)} train, not of {_COMMANDS[task]} train;"
            f" use it with: {_COMMANDS.get(own, own)} evaluate"
        )
    return path, state_dict, carried


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file of `path`, a file or a run folder. Raises UsageError if there is none."""
    if path.is_dir():
        for candidate in (path / "checkpoints" / "last.ckpt", path / "model.safetensors"):
            if candidate.is_file():
                return candidate
        raise UsageError(f"{path} is no run folder: it contains neither checkpoints/last.ckpt nor model.safetensors")
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist; give a run folder, a .ckpt file or a model.safetensors")
    return path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state dict in a checkpoint of dgnet, timm or torchvision, and the description that dgnet's checkpoints have."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if _has_pickled_code(path):
            raise UsageError(
                f"{path} carries pickled code and was not loaded; a checkpoint may hold only tensors and plain values:"
                " save the state dict, or use safetensors"
            ) from None
        raise _truncated(path) from None
    except Exception:  # torch may raise anything for such bytes
        raise _truncated(path) from None
    content = content if isinstance(content, dict) else {}
    carried = content.get("dgnet")
    state = content.get("state_dict", content.get("model", content))
    if carried is not None and isinstance(state, dict):
        prefix = "network."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UsageError(f"{path} holds no state dict; expected a checkpoint of dgnet, timm or torchvision")
    if carried is not None and not isinstance(carried, dict):
        raise UsageError(f"{path} is damaged: the description of its network is no dict; use another checkpoint")
    return dict(state), carried


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            carried = (file.metadata() or {}).get("dgnet")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(json.loads(carried)) if carried else None
    except (SafetensorError, OSError, ValueError, TypeError):
        raise _truncated(path) from None


def load_weights(network: TimmNetwork, model: str, path: str | Path) -> list[str]:
    """Load trained weights into `network`; weights of a static network go to the nodes of its dynamic counterpart.

    Returns the names that keep their initial values: a head of other classes, block gates that the trained network did not
    have, and what a static network lacks. Raises UsageError for weights of another model.
    """
    path = find_checkpoint(Path(path))
    state_dict, carried = read_tensors(path)
    if is_static(network, state_dict):
        try:
            return load_static_weights(network, state_dict)
        except UsageError as error:
            raise UsageError(f"{path} {_mismatch(carried, model)} ({error}); name its own model with --model") from None
    own = network.state_dict()
    reset = find_resized(state_dict, own, classifier_prefixes(network))
    # A DG-Net that was trained without block gates is fine-tuned to a budget: its gates are new.
    new = [n for n in own if ".node_gates." in n and n not in state_dict]
    difference = load_state(network, {**state_dict, **{name: own[name] for name in (*reset, *new)}})
    if difference:
        if carried and carried.get("model") == model:
            line = f"{path} is of {model} with other options ({difference}); use the options in the config.yaml of its run"
        else:
            line = f"{path} {_mismatch(carried, model)} ({difference}); name its own model with --model"
        raise UsageError(line)
    return [*reset, *new]


def find_resized(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> list[str]:
    """The parameters of a head, by the `prefixes` of its names, whose shape differs from that in `own`: of other classes."""
    return [n for n in state_dict if n.startswith(prefixes) and n in own and state_dict[n].shape != own[n].shape]


def _mismatch(carried: dict[str, Any] | None, model: str) -> str:
    of = f"is a checkpoint of {carried.get('model')}" if carried else "does not hold the weights of this model"
    return f"{of}, not of {model} as asked for"


def _truncated(path: Path) -> UsageError:
    return UsageError(f"{path} is truncated or no checkpoint; copy it again or use another, such as checkpoints/best.ckpt")


def load_state(network: nn.Module, state_dict: Mapping[str, Tensor]) -> str:
    """Load a state dict. Returns the first difference from the network's own, in words; "" if there is none.

    If there is a difference, some of the tensors may have been loaded.
    """
    for name, stage in network.named_modules():
        mask = state_dict.get(f"{name}.mask") if isinstance(stage, DynamicGraph) else None
        if mask is not None and not torch.equal(mask.cpu(), stage.topology.mask):
            return f"{name} has other edges"
    own = network.state_dict()
    for name, tensor in state_dict.items():
        if name in own and own[name].shape != tensor.shape:
            return f"{name} has the shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
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
        except (ValueError, RuntimeError):
            return False
    with suppress(ValueError), path.open("rb") as file:  # the format of torch up to 1.5: one pickle after another
        while file.peek(1):
            for operation, argument, _ in pickletools.genops(file):
                module = str(argument).partition(" ")[0]
                if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and module not in _TENSOR_MODULES):
                    return True
    return False


_TENSOR_MODULES = ("torch", "torch._utils", "torch.storage", "collections")
