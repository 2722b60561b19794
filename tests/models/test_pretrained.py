"""The weights that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import dgnet
from dgnet.data import Preprocessing, open_dataset
from dgnet.models import PRETRAINED, list_pretrained, packaged_names
from tests.helpers.command import ask

SHEET = Path(__file__).with_name("cifar10.png")
"""One test image of each class of CIFAR-10 in a row, 32×32 pixels each."""
ANSWERS = Path(__file__).with_name("pretrained.json")
"""Logits of each network for its images, and which of them are right."""
MEGABYTE = 1e6
ROOT = Path(__file__).parents[2]


def cut_sheet() -> list[Image.Image]:
    sheet = Image.open(SHEET)
    return [sheet.crop((32 * index, 0, 32 * index + 32, 32)) for index in range(10)]


@torch.no_grad()
def answer(name: str) -> torch.Tensor:
    """The logits of ten images of the data on which the network `name` was trained."""
    network = timm.create_model(name, pretrained=True).eval()
    transform = Preprocessing.of(network.pretrained_cfg).evaluation_transform()
    if ".digits" in name:
        digits = open_dataset("digits", "evaluation")
        digits.transform = transform
        images = [digits[index][0] for index in range(0, 350, 35)]
    else:
        images = [transform(image) for image in cut_sheet()]
    return network(torch.stack(images))


def record() -> None:
    """Write ANSWERS."""
    answers = {name: [[round(x, 4) for x in row] for row in answer(name).tolist()] for name in packaged_names()}
    lines = [f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in answers.items()]
    ANSWERS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@pytest.mark.parametrize("name", packaged_names())
def test_the_logits_are_those_of_the_trained_network(name):
    expected = torch.tensor(json.loads(ANSWERS.read_text())[name])
    found = answer(name)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    if name.endswith("cifar10"):
        assert (found.argmax(1) == torch.arange(10)).sum() >= 7


def test_they_are_small():
    sizes = [(PRETRAINED / name / "model.safetensors").stat().st_size for name in packaged_names()]
    assert max(sizes) < 2.5 * MEGABYTE
    assert sum(sizes) < 8 * MEGABYTE


@pytest.mark.parametrize("row", list_pretrained(), ids=lambda row: row.name)
def test_what_is_said_of_them_is_what_is_counted(row):
    network = dgnet.create_model(row.name, pretrained=True)
    counted = dgnet.cost(network)
    assert counted.params == row.parameters
    if row.name.startswith("dg_"):
        assert row.executed_multiply_adds <= row.dense_multiply_adds
    cfg = network.pretrained_cfg
    assert cfg["license"] == "apache-2.0"
    assert len(cfg["label_names"]) == cfg["num_classes"] == 10
    assert row.command.startswith("dgnet train --")
    assert row.top1 > 80
    about = json.loads((PRETRAINED / row.name / "config.json").read_text())["dgnet"]
    assert about["source"]
    assert about["recipe"] is None or (ROOT / about["recipe"]).is_file()


def test_a_name_without_a_tag_has_the_network_without_a_budget():
    named, tagged = (timm.create_model(name, pretrained=True) for name in ("dg_resnet32", "dg_resnet32.cifar10"))
    for name, tensor in named.state_dict().items():
        assert torch.equal(tensor, tagged.state_dict()[name])
    with_gates = timm.create_model("dg_resnet32.cifar10_budget60", pretrained=True)
    assert any(".node_gates." in name for name in with_gates.state_dict())


@pytest.mark.slow
def test_a_name_is_analysed_as_a_run_is(capsys, tmp_path):
    ask(capsys, "analyze", "dg_resnet20.digits_budget50", "--data", "digits", "--output", tmp_path / "analysis")
    assert (tmp_path / "analysis" / "explorer.html").is_file()


def test_commands_take_their_names(capsys, tmp_path):
    cut_sheet()[8].save(tmp_path / "ship.png")
    assert "ship" in ask(capsys, "predict", "dg_resnet32.cifar10_budget60", str(tmp_path / "ship.png"))
    found = json.loads(ask(capsys, "evaluate", "dg_resnet20.digits_budget50", "--data", "digits", "--json"))
    (row,) = [row for row in list_pretrained() if row.name == "dg_resnet20.digits_budget50"]
    assert found["top1"] == pytest.approx(row.top1)
    assert found["executed_multiply_adds"] == pytest.approx(row.executed_multiply_adds, rel=1e-3)
