"""`dgnet analyze` with several runs: means over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dgnet.analysis._analyze import gather_statistics
from dgnet.checkpoint import describe_network, load_checkpoint, save_tensors
from dgnet.data import Preprocessing
from dgnet.evaluation import open_evaluation_data
from dgnet.files import read_table
from dgnet.models import create_model
from tests.helpers.command import ask, refuse
from tests.helpers.data import write_folder

PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def write_run(folder: Path, seed: int, data: Path, model: str = "dg_resnet20", **options: object) -> Path:
    torch.manual_seed(seed)
    options = {"channels": [4, 4, 4], **options}
    network = create_model(model, num_classes=2, **options)
    described = describe_network(model, options, ["ant", "cat"], PREPROCESSING, {"data": str(data), "val_data": None})
    folder.mkdir()
    save_tensors(network.state_dict(), folder / "model.safetensors", described)
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    data = write_folder(tmp_path / "data", {"ant": 3, "cat": 3})
    return [write_run(tmp_path / f"seed{seed}", seed, data, router_std=0.5) for seed in range(3)]


@pytest.mark.slow
def test_means_and_spreads_are_those_of_the_single_runs(runs, tmp_path, capsys):
    checkpoints = [load_checkpoint(run) for run in runs]
    dataset = open_evaluation_data(checkpoints[0])
    single = [gather_statistics(checkpoint.build_network(), dataset) for checkpoint in checkpoints]
    document = json.loads(ask(capsys, "analyze", *runs, "--output", tmp_path / "means", "--json"))
    rows = read_table(tmp_path / "means" / "edges.csv")
    edges = [(str(edge.stage), str(edge.sender), str(edge.receiver)) for edge in single[0].edges]
    assert [(row["stage"], row["sender"], row["receiver"]) for row in rows] == edges
    for name in ("mean", "std", "open_share"):
        values = torch.stack([getattr(found, name)() for found in single])
        torch.testing.assert_close(torch.tensor([float(row[name]) for row in rows]).double(), values.mean(0).double())
        spreads = torch.tensor([float(row[f"{name}_seed_std"]) for row in rows]).double()
        torch.testing.assert_close(spreads, values.std(0).double(), atol=1e-6, rtol=1e-4)
    assert max(float(row["mean_seed_std"]) for row in rows) > 0.01
    top1 = [found.top1 for found in single]
    assert document["runs"] == 3
    assert document["figures"]["top1"]["mean"] == pytest.approx(sum(top1) / 3)
    assert sorted(document["files"]) == ["edges.csv", "mean.png", "mean.svg", "seed_std.png", "seed_std.svg"]
    assert json.loads((tmp_path / "means" / "analysis.json").read_text()) == document


def test_runs_that_have_no_mean_are_refused(runs, tmp_path, capsys):
    output = ["--output", tmp_path / "means"]
    first, second, _ = runs
    other = write_run(tmp_path / "other", 0, tmp_path / "data", topology="residual")
    static = write_run(tmp_path / "static", 0, tmp_path / "data", "dg_resnet32")
    for words, message in [
        ([first, second], "several runs need --output"),
        ([first, first, *output], "is given twice; means are over different runs"),
        ([first, other, *output], "has other edges than"),
        ([first, static, *output], "is of dg_resnet32 with 2 classes, and"),
        ([first, second, *output, "--images", "1"], "--images is for one checkpoint, and 2 are named; leave it out"),
    ]:
        assert message in refuse(capsys, "analyze", *words)
    assert not list((tmp_path / "means").glob("*"))
