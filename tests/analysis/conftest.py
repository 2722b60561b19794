"""Fixtures of the tests of pictures."""

from __future__ import annotations

import pytest
import torch

import dgnet
from tests.helpers.networks import close_some


@pytest.fixture
def record(tiny):
    """Six images through a network with some edges closed."""
    network = tiny()
    images = torch.randn(6, 3, 12, 10)
    close_some(network, images)
    with torch.no_grad(), dgnet.record_connectivity(network) as record:
        network(images)
    return record
