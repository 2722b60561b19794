"""One small network of each of timm's model files: it converts to the same function, or has no run for a listed reason."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from tests.helpers.static import largest_difference, shake_all_norms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

# Model file -> name, side of the images, options that make the network smaller.
CONVERTED: dict[str, tuple[str, int, dict[str, object]]] = {
CONVERTED_TABLE
}

# Model file -> name, side, and why the network has no run.
STATIC: dict[str, tuple[str, int, str]] = {
STATIC_TABLE
}

TOLERANCE = 1e-5


def find_files() -> dict[str, list[str]]:
    """timm's own model files, with the names that they register."""
    files: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module.startswith("timm.models."):
            files.setdefault(module.rpartition(".")[2], []).append(name)
    return files


def build(name: str, options: dict[str, object]) -> nn.Module:
    """The network with random normalisation statistics and without dropout."""
    network = shake_all_norms(timm.create_model(name, num_classes=10, **options))
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return network


@torch.no_grad()
def run(network: nn.Module, images: Tensor, is_training: bool) -> Tensor:
    """All outputs in a row, (B, …). In training some networks draw random numbers."""
    torch.manual_seed(1)
    outputs = network.train(is_training)(images)
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    return torch.cat([output.flatten(1) for output in outputs], dim=1)


def test_every_file_of_timm_is_listed():
    files = find_files()
    assert {*CONVERTED, *STATIC} == set(files), "a model file of timm is new or gone: add a small network of it to a table"
    assert not {*CONVERTED} & {*STATIC}
    for file, (name, *_) in {**CONVERTED, **STATIC}.items():
        assert name in files[file]


def test_most_files_of_timm_convert():
    assert len(CONVERTED) >= 0.8 * (len(CONVERTED) + len(STATIC))


@pytest.mark.slow
@pytest.mark.parametrize("file", CONVERTED)
def test_the_function_stays_the_same(file):
    name, side, options = CONVERTED[file]
    static, images = build(name, options), torch.randn(3, 3, side, side)
    converted = dgnet.convert(static, image_size=side)
    assert converted.conversion.stages
    gated = dgnet.convert(static, image_size=side, node_gate="hard")
    for network, is_training in ((converted, False), (gated, False), (converted, True)):
        expected = run(static, images, is_training)
        assert expected.abs().max() > 0
        difference = largest_difference(run(network, images, is_training), expected)
        if difference > TOLERANCE:  # batch statistics of small maps amplify rounding: as much as in the static network itself
            exact = run(static.double(), images.double(), is_training)
            rounding = largest_difference(expected.double(), exact)
            assert difference < 5 * rounding
            again = run(network.double(), images.double(), is_training)
            assert largest_difference(again, exact) < 1e-9 * max(1.0, rounding / 1e-5)
            static.float()
            network.float()


@pytest.mark.slow
@pytest.mark.parametrize("file", STATIC)
def test_a_network_without_runs_says_why(file):
    name, side, reason = STATIC[file]
    with pytest.raises(UsageError, match=rf"has no run of blocks that could become a stage \(.*{reason}"):
        dgnet.convert(timm.create_model(name, num_classes=10), image_size=side)
