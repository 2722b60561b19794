"""Networks of the user's own whose blocks stay static, or that are refused, as a stage would compute something else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from tests.helpers.own_networks import IMAGES, Block, Network, convert, in_a_row

# --- what stays static because the network reads or changes features between blocks


def _lists(network: Network, x: Tensor) -> list[Tensor]:
    outputs = []
    for block in network.blocks:
        x = block(x)
        outputs.append(x)
    return outputs


def _keeps(network: Network, x: Tensor) -> Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x)
        if number == 1:
            network.kept = x
    return x


def _reads_in_training(network: Network, x: Tensor) -> Tensor:
    kept = None
    for block in network.blocks:
        x = block(x)
        kept = x if kept is None else kept
    return x + kept if network.training else x


def _drops_paths(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = network.drop(block(x))
    return x


def _drops_layers(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        if not network.training or torch.rand(1) > 0.01:
            x = block(x)
    return x


def _drops_layers_in_python(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        if not network.training or random.random() > 0.5:
            x = block(x)
    return x


def _adds_in_training(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = block(x)
        if network.training:
            x += 0.5
    return x


CHANGED = "in training, a feature between it and the next block is changed or read elsewhere"


@pytest.mark.parametrize(
    ("steps", "parts", "reason"),
    [
        (_lists, {}, "it is one block only"),
        (_drops_paths, {"drop": DropPath(0.0)}, "it is one block only"),
        (_drops_paths, {"drop": DropPath(0.3)}, "it is one block only"),
        (_drops_layers, {}, "in training it is not always called"),
        (_drops_layers_in_python, {}, "in training it is not always called"),
        (_adds_in_training, {}, CHANGED),
    ],
    ids=["outputs", "a module between", "drop path", "layer drop", "layer drop in Python", "only in training"],
)
def test_blocks_between_which_something_happens_stay_static(steps, parts, reason):
    with pytest.raises(UsageError, match=f"has no run of blocks .*{reason}"):
        convert(Network(steps, **parts))


@pytest.mark.parametrize(("steps", "first"), [(_keeps, "blocks.2"), (_reads_in_training, "blocks.1")])
@torch.no_grad()
def test_a_feature_that_is_kept_or_read_in_training_ends_a_run(steps, first):
    static = Network(steps, blocks=5).eval()
    converted = convert(static)
    assert [run.name for run in converted.conversion.stages if len(run.blocks) > 1][-1] == first
    for is_training in (False, True):
        expected, found = (network.train(is_training)(IMAGES) for network in (static, converted))
        torch.testing.assert_close(found, expected)
    if steps is _keeps:
        torch.testing.assert_close(converted.kept, static.kept)


def test_random_numbers_and_the_modes_of_modules_stay_as_they_are():
    static = Network(in_a_row).train()
    static.blocks[0].bn.eval()
    modes = [module.training for module in static.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    dgnet.convert(static, image_size=16, check=IMAGES, weighting="fixed")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert [module.training for module in static.modules()] == modes


# --- what is refused because the result would compute something else


def _through_list(network: Network, x: Tensor) -> Tensor:
    for block in network.other:
        x = block(x)
    return x


def _partly_through_list(network: Network, x: Tensor) -> Tensor:
    x = network.blocks[0](x)
    for block in network.other[1:]:
        x = block(x)
    return x


def _if_block(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        if isinstance(block, Block):
            x = block(x)
    return x


def _looks_inside(network: Network, x: Tensor) -> Tensor:
    assert network.blocks[1].conv1.kernel_size == (3, 3)
    return in_a_row(network, x)


def _through_data(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = block(x)
        x.data.mul_(0.5)
    return x


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (_through_list, "stage blocks.0 is not called: the network holds its blocks in another place too"),
        (_partly_through_list, "the feature after stage blocks.0 differs"),
        (_if_block, "stage blocks.0 is not called"),
        (_looks_inside, "its forward pass reads parts of blocks that are in a stage now .*conv1"),
    ],
    ids=["list", "partly list", "by class", "looks inside"],
)
def test_networks_that_reach_their_blocks_in_another_way_are_refused(steps, reason):
    static = Network(steps)
    static.other = list(static.blocks)
    with pytest.raises(UsageError, match=f"Network cannot be converted without changing its function: {reason}"):
        convert(static)


def test_the_result_is_run_on_images(monkeypatch):
    """Whatever the trace does not see."""
    monkeypatch.setattr("dgnet.models._increment.Increment.forward", lambda self, x: self.block(x))
    with pytest.raises(UsageError, match=r"without changing its function: the feature after stage blocks.0 differs"):
        convert(Network(in_a_row))
    with pytest.raises(UsageError, match="has no run of blocks"):
        convert(Network(_through_data))


class Router(nn.Module):
    def __init__(self, channels: int, edges: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, edges)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(pooled).sigmoid()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"router": Router}, "the feature after stage blocks.0 differs; leave out the options"),
        ({"node_gate": "hard", "node_gate_bias": 0.1, "threshold_offset": 0.1}, "a gate is closed; leave out"),
        ({"node_gate": False}, "unknown node_gate False; allowed: none, hard, gumbel"),
        ({"weighting": 3}, "weighting is routed, signed, linear, softmax, learned, fixed or a callable .* got 3"),
        ({"weighting": [1]}, r"weighting is routed, signed, linear, softmax, learned, fixed or a callable .* got \[1\]"),
        ({"topology": 3}, "topology is a name, a mask, a callable .* got 3"),
        ({"stages": np.array(["blocks", "head"])}, "stages is 'auto' or a list of names"),
    ],
)
def test_options_under_which_the_function_would_change_or_that_mean_nothing(options, line):
    with pytest.raises(UsageError, match=line):
        convert(Network(in_a_row), **options)
