"""Checkpoints to publish."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dgnet.checkpoint import Checkpoint, describe_network, save_tensors
from dgnet.data import Preprocessing
from dgnet.models import stored_options
from tests.helpers.networks import build, shake_norms

NAMES = ["a|b", "<b>bold</b>", "`code` *x*", "# title\n- list"]
NETWORKS = {
    "dg_resnet20": {"channels": (4, 6, 8), "node_gate": "hard", "threshold_offset": 0.1},
    "randwire_small_ws": {"num_blocks": 6, "channels": 8},
    "resnet20": {"channels": (4, 6, 8)},
    "test_resnet": {"dynamic": True, "node_gate": "hard"},
}


def save(path: Path, name: str, **options: object) -> nn.Module:
    """Save a checkpoint of a network with changed weights, and return the network."""
    network = shake_norms(build(name, num_classes=len(NAMES), **options)).eval()
    checkpoint = Checkpoint(
        path,
        network.state_dict(),
        name,
        stored_options(network, options),
        NAMES,
        {},
        Preprocessing.of(network.pretrained_cfg, 32),
    )
    save_tensors(checkpoint.state_dict, path, {**describe(checkpoint)})
    return network


def describe(checkpoint: Checkpoint) -> dict[str, object]:
    return describe_network(
        checkpoint.model, checkpoint.model_kwargs, checkpoint.class_names, checkpoint.preprocessing, checkpoint.config
    )
