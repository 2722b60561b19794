from __future__ import annotations

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.inference import fold_batch_norms
from tests.helpers.networks import shake_norms

NETWORKS: dict[str, dict[str, object]] = {
    "resnet20": {},
    "dg_resnet20": {},
    "resnet18": {},
    "dg_resnet50": {},
    "dg_regnety_006": {},
    "dg_mobilenetv2_100": {},
    "dg_randwire_small": {"num_blocks": 7, "channels": 8, "head_channels": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_folded_network_is_the_same_function_without_normalisations(name):
    network = shake_norms(dgnet.create_model(name, num_classes=5, **NETWORKS[name])).eval()
    network, images = network.double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected = network(images)
    torch.testing.assert_close(folded(images), expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# --- where folding would change the function


class Steps(nn.Module):
    """A convolution, a normalisation, and a forward pass that is a function of both."""

    def __init__(self, steps, conv: nn.Module | None = None, **options: object) -> None:
        super().__init__()
        self.steps, self.conv = steps, conv or nn.Conv2d(3, 4, 3)
        self.norm, self.other = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4)
        if not options:
            shake_norms(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.steps(images, self.conv, self.norm, self.other)


def _read_twice(x, conv, norm, other):
    y = conv(x)
    return norm(y) + y


def _change_in_place(x, conv, norm, other):
    y = conv(x)
    y.data.mul_(2)
    return norm(y)


def _in_a_row(x, conv, norm, other):
    return norm(conv(x))


def _with_hook() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_hook(lambda module, inputs, output: output.relu())
    return conv


def _with_own_forward() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda x: nn.Conv2d.forward(conv, x).relu()
    return conv


UNSAFE = {
    "an activation in place": lambda: Steps(lambda x, conv, norm, other: norm(nn.functional.relu_(conv(x)))),
    "another reader": lambda: Steps(_read_twice),
    "a convolution that is called twice": lambda: Steps(lambda x, conv, norm, other: norm(conv(x)) + other(conv(x))),
    "a change in place": lambda: Steps(_change_in_place),
    "a hook": lambda: Steps(_in_a_row, _with_hook()),
    "a forward pass of its own": lambda: Steps(_in_a_row, _with_own_forward()),
    "a standardised weight": lambda: Steps(_in_a_row, StdConv2d(3, 4, 3)),
    "a parametrization": lambda: Steps(_in_a_row, nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "spectral norm": lambda: Steps(_in_a_row, nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
    "spectral norm of older versions": lambda: Steps(_in_a_row, nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))),
    "statistics of the batch": lambda: Steps(_in_a_row, track_running_stats=False),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", UNSAFE)
def test_a_normalisation_stays_where_folding_would_change_the_function(kind):
    network, images = UNSAFE[kind]().eval(), torch.randn(2, 3, 8, 8)
    expected = network(images)
    folded = fold_batch_norms(network, 8)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 2
    torch.testing.assert_close(folded(images), expected)


@torch.no_grad()
def test_a_network_that_reads_values_is_folded():
    network = Steps(lambda x, conv, norm, other: norm(conv(x)) if x.sum().item() else x).eval()
    images = torch.randn(2, 3, 8, 8)
    folded = fold_batch_norms(network, 8)
    assert isinstance(folded.norm, nn.Identity)
    torch.testing.assert_close(folded(images), network(images))


@pytest.mark.parametrize(("size", "line"), [("x", "image_size is a number of pixels"), (2, "Steps cannot be folded: it takes")])
def test_a_size_that_the_network_cannot_take(size, line):
    with pytest.raises(UsageError, match=line):
        fold_batch_norms(Steps(_in_a_row), size)
