"""Weights from a file, fitted to a network: also those of a static network, of other classes, and for other image sizes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.checkpoint._files import damaged, find_checkpoint, read_tensors
from dgnet.errors import UsageError, reason
from dgnet.graph import DynamicGraph
from dgnet.models import (
    ConvertedNetwork,
    TimmNetwork,
    adapt_input,
    adapt_positions,
    as_words,
    check_finite,
    classifier_prefixes,
    describe_loss,
    find_obstacle,
    is_static,
    keep_function,
    load_static_weights,
    match_names,
    missing_options,
    removed_blocks,
    unwrap_names,
)


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
