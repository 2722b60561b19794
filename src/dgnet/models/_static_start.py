"""A dynamic network that starts as the static network whose weights it takes: its options, and the check.

Two forms keep the function. *Without an activation after additions* (MobileNetV2) a chain of residual blocks is a sum over all
blocks before: the complete graph with every weight 1, the shortcut an edge, and added projections at 0. *With an activation*
(ResNet, RegNet) only the whole blocks in a row compute the same: the shortcut in the node, the edges of the chain at weight 1,
all others at 0. Gates are refused there: a block that closes would cut the chain. (A ResNet-20 with 99 % on the digits,
fine-tuned to a budget of 0.6, ended at 39 %.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph import TOPOLOGIES, DynamicGraph, FixedWeighting, StageOptions
from dgnet.models._agreement import TOLERANCE, compare
from dgnet.models._convert import find_change_of_network
from dgnet.models._converted import ConvertedNetwork
from dgnet.models._dynamic import DynamicFamily, DynamicNetwork
from dgnet.models._inputs import find_channels, find_image_size
from dgnet.models._protocol import TimmNetwork

STARTS = ("paper", "static")
"""How a dynamic network starts from static weights: with the paper's edge weights, or as the static network."""


def static_start_options(network: TimmNetwork, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `create_model` with which a network of this kind starts as the static network, the ones in `given` included.

    `given`: options that must stay as they are. Raises UsageError for one that contradicts, for gates where a closed one would
    cut the blocks that start in a row, and for a network without a static counterpart.
    """
    if isinstance(network, DynamicNetwork) and not isinstance(network, DynamicFamily):
        raise UsageError("a converted network always starts as the static one; leave start 'static' out")
    if not isinstance(network, DynamicFamily) or not network.static_names:
        raise UsageError(
            f"start 'static' is for dg_ networks that take the weights of a static one; {type(network).__name__} does not:"
            " leave it out"
        )
    needed, suggested = _choose(network, given)
    if needed["shortcut"] == "node" and given.get("node_gate", "none") != "none":
        raise UsageError(
            "start 'static' opens the edges of a chain in this network, and a closed gate would cut it: leave out gates and"
            " --budget, use start 'paper', or make the static network itself dynamic (dgnet.convert, --dynamic true)"
        )
    for name, value in needed.items():
        if name in given and given[name] != value:
            raise UsageError(
                f"start 'static' needs {name}={value!r}, got {given[name]!r}; leave {name} out, or use start 'paper'"
            )
    return {**suggested, **given, **needed}


def _choose(network: DynamicFamily, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that keep the function with the weighting and the gates that are given, and those that help to train it."""
    weighting, has_gates = given.get("weighting", "routed"), given.get("node_gate", "none") != "none"
    needed: dict[str, Any] = {"weighting": weighting}
    suggested: dict[str, Any] = {}
    if all(isinstance(stage.activation, nn.Identity) for stage in network.stages):
        needed |= {"topology": "complete", "shortcut": "edge"}
    elif weighting == "routed":
        needed |= {"topology": "complete", "shortcut": "node", "router_start": "chain"}
    elif weighting in ("signed", "linear"):
        needed |= {"topology": "complete", "shortcut": "node", "static_start": "identity"}
    else:
        needed |= {"topology": "chain", "shortcut": "node"}
    if weighting == "routed":
        needed |= {"unit_start": True, "router_std": 0.0}
    if weighting == "learned":
        needed |= {"learned_start": 1.0, "learned_activation": "identity"}
    if has_gates:
        needed |= {"node_gate_std": 0.0}
    if weighting in ("signed", "linear"):
        needed = {"static_start": "ones"} | needed
    if has_gates or weighting == "routed":
        suggested |= {"router_norm": "layer"}  # features of a trained network are not of unit scale
    return needed, suggested


def find_obstacle(network: TimmNetwork, weights_of: str = "") -> str:
    """Why `network` cannot compute the function of its static counterpart, whatever its options; "" if it can.

    `weights_of`: the name of the static model, "" if it is not known.
    """
    return network.static_obstacle(weights_of) if isinstance(network, DynamicFamily) else ""


def keep_function(network: TimmNetwork, untrained: Sequence[str], image_size: int | tuple[int, int] | None = None) -> list[str]:
    """Set to 0 the projections that the static network lacks, and check that the network now computes the same.

    `untrained`: the names that loading static weights left as initialised. Returns those that still are.

    Raises UsageError if the logits of two random images differ by more than `TOLERANCE`.
    """
    if isinstance(network, ConvertedNetwork):  # it starts so; training may have changed its weights
        change = find_change_of_network(network, image_size)
        if change:
            raise UsageError(f"{change}; convert the static network again, or use start 'paper'")
    if not isinstance(network, DynamicFamily):
        return list(untrained)
    zeroed: set[str] = set()
    for name, stage in zip(network.stage_names, network.stages, strict=True):
        if stage.entry_shortcut or not any(other.startswith(f"{name}.input.") for other in untrained):
            continue
        # As a residual block whose last γ starts at 0: the projection adds nothing yet, but its γ has a gradient.
        norms = [(path, part) for path, part in stage.input.named_modules() if isinstance(part, nn.BatchNorm2d)]
        for path, norm in norms[-1:]:
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
            zeroed |= {f"{name}.input.{path}.weight", f"{name}.input.{path}.bias"}
    difference = measure_difference(network, image_size)
    if not difference <= TOLERANCE:
        needed, _ = _choose(network, network.connectivity_options)
        built = network.connectivity_options
        wrong = [f"{name}={value!r}" for name, value in needed.items() if built.get(name) != value]
        advice = f"build it with {', '.join(wrong)}" if wrong else "leave out the options of thresholds and gates"
        raise UsageError(
            f"the network does not compute what the static one does: {_in_words(difference)}, which is more than rounding;"
            f" {advice}, or use start 'paper'"
        )
    return [name for name in untrained if name not in zeroed]


def describe_loss(network: TimmNetwork, image_size: int | tuple[int, int] | None = None, weights_of: str = "") -> str:
    """What a network that has taken static weights loses of the static network's function; "" if nothing."""
    if not isinstance(network, DynamicFamily):
        return ""
    obstacle = find_obstacle(network, weights_of)
    if obstacle:
        return f"this start does not keep the function of the static network ({obstacle})"
    difference = measure_difference(network, image_size)
    if difference <= TOLERANCE:
        return ""
    return f"this start does not keep the function of the static network ({_in_words(difference)})"


def measure_difference(network: DynamicFamily, image_size: int | tuple[int, int] | None = None) -> float:
    """The largest difference of a logit from the static network of the same weights, as a share of the largest logit.

    On two random images, in evaluation; `image_size`: in pixels, None: the model's own. Infinite if a stage lacks the
    projection that the static network has.
    """
    shape = (2, find_channels(network), *find_image_size(network, image_size))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_like(network))
    static = copy.deepcopy(network)
    _make_static(static)
    try:
        return compare(static, network, images).difference
    except RuntimeError:  # a projection that nobody reads was not built
        return math.inf


def _make_static(network: DynamicFamily) -> None:
    """Replace each stage by its blocks in a row, with their shortcuts: the static network."""
    for name, stage in zip(network.stage_names, network.stages, strict=True):
        chain = TOPOLOGIES["chain"](stage.topology.num_nodes)
        weighting = FixedWeighting(chain, 1).to(_like(network))
        options = StageOptions(shortcut="node")
        parts = stage.input, list(stage.nodes), stage.activation
        network.set_submodule(name, DynamicGraph(chain, weighting, *parts, options, stage.entry_shortcut))


def _like(network: nn.Module) -> torch.Tensor:
    return next(network.parameters())


def _in_words(difference: float) -> str:
    if not math.isfinite(difference):
        return "its logits are others"
    return f"its logits differ by {100 * difference:.3g} % of the largest, on random images"
