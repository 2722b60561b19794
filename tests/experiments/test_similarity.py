"""The network that `dgnet experiment similarity` compares a run with: as before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dgnet
from dgnet.checkpoint import Checkpoint
from dgnet.data import Preprocessing
from dgnet.errors import UsageError
from dgnet.experiments._similarity import draw_start
from tests.helpers.networks import FAMILIES


def _checkpoint_of(name: str, options: dict[str, object], **config: object) -> Checkpoint:
    """That of a run, whose network is as it was built."""
    network = dgnet.create_model(name, num_classes=2, **options)
    preprocessing = Preprocessing.of(network.pretrained_cfg)
    return Checkpoint(Path("last.ckpt"), network.state_dict(), name, options, ["cat", "dog"], config, preprocessing)


@pytest.mark.parametrize(
    ("name", "options"),
    [*FAMILIES.items(), ("test_convnext", {"depths": (1, 2, 3, 1), "dynamic": True})],
    ids=[*FAMILIES, "converted"],
)
def test_the_start_of_a_run_is_drawn_anew(name, options):
    torch.manual_seed(1)
    checkpoint = _checkpoint_of(name, options)
    start = draw_start(Path("run"), checkpoint)
    convolutions = {f"{name}.weight" for name, module in start.named_modules() if isinstance(module, nn.Conv2d)}
    assert len(convolutions) > 10
    state = start.state_dict()
    assert not [name for name in convolutions if torch.equal(state[name], checkpoint.state_dict[name])]


def test_the_start_of_a_run_is_the_same_each_time():
    checkpoint = _checkpoint_of("dg_resnet20", {"weighting": "signed", "static_start": "normal"})
    first, second = (draw_start(Path("run"), checkpoint).state_dict() for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize(("option", "value"), [("weights", "static.safetensors"), ("pretrained", True)])
def test_the_start_of_a_run_that_began_with_trained_weights_is_refused(option, value):
    checkpoint = _checkpoint_of("dg_resnet20", {}, **{option: value})
    line = rf"^RUN began with trained weights \(--{option}\), so its start cannot be drawn"
    with pytest.raises(UsageError, match=line):
        draw_start(Path("RUN"), checkpoint)
