"""`dgnet analyze` as a user types it: files, words, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dgnet.analysis._analyze import analyze, name_runs
from dgnet.checkpoint import describe_network, save_tensors
from dgnet.data import Preprocessing
from dgnet.errors import UsageError
from dgnet.files import read_table
from dgnet.graph import find_stages
from dgnet.models import create_model
from tests.helpers.command import ask, refuse
from tests.helpers.data import Images, jpeg, write_shard
from tests.helpers.networks import close_some, spread_routers

PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLASSES = ["dark", "light", "noisy"]
ODD = 'an <odd> & "quoted" name, $5 or $6 😀.png'
OPTIONS = {"channels": [4, 4, 4], "topology": "residual"}


def write_checkpoint(folder: Path, model: str, data: Path, options: dict[str, object], close: bool = False) -> Path:
    network = create_model(model, num_classes=len(CLASSES), **options)
    if close:
        for stage in find_stages(network):
            spread_routers(stage)
        close_some(network, torch.randn(12, 3, 8, 8))
    config = {"data": str(data), "val_data": None}
    folder.mkdir(parents=True)
    save_tensors(
        network.state_dict(), folder / "model.safetensors", describe_network(model, options, CLASSES, PREPROCESSING, config)
    )
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes; noise, so that wirings differ."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for index in range(4 + label):
            noise = torch.randint(0, 256, (9, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(root / name / f"{index}.png")
    (root / "noisy" / "0.png").rename(root / "noisy" / ODD)
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "routed", "dg_resnet20", images, OPTIONS, close=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_a_run_is_analysed(run, images, tmp_path, capsys):
    output = ask(capsys, "analyze", run, "--output", tmp_path, "--extremes", 2, "--batch-size", 4)
    figures = {"mean", "std", "open", "graphs_easiest", "graphs_hardest", "graphs_cheapest", "graphs_dearest"}
    figures |= {"class_means", "class_distance", "embedding"}
    tables = {"edges.csv", "images.csv", "class_means.csv", "class_distance.csv", "embedding.csv"}
    written = (
        {f"{name}.{ending}" for name in figures for ending in ("png", "svg")} | tables | {"analysis.json", "explorer.html"}
    )
    assert names(tmp_path) == written
    assert f"dg_resnet20 on {images}, 15 images" in output
    assert [f"({number}) " in output for number in range(1, 6)] == [True] * 5
    assert output.count("does not hold.") + output.count(": holds.") + output.count(": cannot be decided.") == 5

    edges = read_table(tmp_path / "edges.csv")
    assert len(edges) == 3 * 7
    assert set(edges[0]) == {"stage", "sender", "receiver", "is_free", "mean", "std", "open_share"}
    shown = read_table(tmp_path / "images.csv")
    assert [row["group"] for row in shown] == [g for g in ("easiest", "hardest", "cheapest", "dearest") for _ in range(2)]
    assert float(shown[0]["loss"]) <= float(shown[1]["loss"]) < float(shown[2]["loss"])
    assert len(read_table(tmp_path / "class_means.csv")) == 3 * len(edges)
    assert len(read_table(tmp_path / "embedding.csv")) == 15


@pytest.mark.slow
def test_json_is_one_document_that_agrees_with_evaluate(run, tmp_path, capsys):
    found = json.loads(ask(capsys, "analyze", run, "--output", tmp_path, "--extremes", 0, "--explorer", 0, "--json"))
    assert found == json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    expected = json.loads(ask(capsys, "evaluate", run, "--json"))
    shared = found.keys() & expected.keys() - {"loss"}
    assert {name: found[name] for name in shared} == pytest.approx({name: expected[name] for name in shared})
    assert {"top1", "closed_edges", "distinct_wirings", "executed_multiply_adds", "executed_std", "weight_std"} <= shared
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert 0 < found["closed_edges"] < 1 < found["distinct_wirings"]
    assert [observation["number"] for observation in found["observations"]] == [1, 2, 3, 4, 5]
    assert set(found["files"]) == names(tmp_path) - {"analysis.json"}


@pytest.mark.slow
def test_images_are_chosen_by_index_and_by_name(run, images, tmp_path, capsys):
    output = ask(capsys, "analyze", run, "--output", tmp_path, "--images", 3, "light/1.png", images / "dark" / "2.png", ODD)
    rows = read_table(tmp_path / "images.csv")
    assert [(row["group"], row["index"]) for row in rows] == [("chosen", index) for index in ("3", "5", "2", "14")]
    assert rows[3]["name"] == str(images / "noisy" / ODD)
    assert "graphs_chosen.png" in output
    assert "graphs_easiest" not in output
    assert "graphs_chosen.svg" in names(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--images", 15], "image 15 is out of range: the data set holds 15, 0 to 14"),
        (["--images=-1"], "image -1 is out of range"),
        (["--images", "nowhere.png"], "no image is called 'nowhere.png'; the first is "),
        (["--images", "1.png"], "images are called '1.png', indices 1, 5,"),
        (["--extremes", 13], "--extremes must be 0 to 12, got 13"),
        (["--batch-size", 0], "--batch-size must be at least 1"),
        (["--workers", -1], "--workers must be 0 to 1024"),
        (["--data", "nowhere"], "data source 'nowhere' does not exist"),
        (["--curves", "nowhere"], "nowhere is not a run folder, or its metrics.csv holds no epoch"),
        (["--output", "FILE"], "cannot be written: "),
        (["--output", "FILE/sub"], "cannot be written: Not a directory; name another with --output"),
    ],
)
def test_what_is_refused(run, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    assert expected in refuse_after_progress(capsys, "analyze", run, *output, *words)


def refuse_after_progress(capsys, *arguments: object) -> str:
    """The line with which the command refuses, be it after a progress bar."""
    from dgnet.cli import main

    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    return errors.splitlines()[-1]


def test_nothing_to_analyse(images, tmp_path, capsys):
    assert "name a checkpoint, or runs with --curves" in refuse(capsys, "analyze")
    assert "--curves without a checkpoint needs --output" in refuse(capsys, "analyze", "--curves", tmp_path)
    static = write_checkpoint(tmp_path / "static", "resnet20", images, {"channels": [4, 4, 4]})
    assert "is of resnet20, a static network: it has no routed edges to analyse" in refuse(capsys, "analyze", static)
    with pytest.raises(UsageError, match="the data set holds no images"):
        analyze(create_model("dg_resnet20"), Images(torch.zeros(0, 3, 8, 8), []), tmp_path)


def test_an_empty_folder_is_refused(run, tmp_path, capsys):
    assert "holds no images; allowed extensions: .jpg" in refuse(capsys, "analyze", run, "--data", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_images_without_labels(run, tmp_path, capsys, kind):
    data = tmp_path / "plain"
    data.mkdir()
    for index in range(5):
        (data / f"{index}.jpg").write_bytes(jpeg(50 * index))
    if kind == "shard":
        data = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(50 * index)} for index in range(5)])
    output = ask(capsys, "analyze", run, "--data", data, "--output", tmp_path / "out", "--images", 1)
    assert "no image has a label: no accuracy, loss or classes" in output
    assert "without labels the easy images are not known" in output
    found = names(tmp_path / "out")
    assert {"mean.png", "std.svg", "open.png", "graphs_chosen.png", "edges.csv"} <= found
    assert not any(name.startswith("class_") for name in found)
    found = json.loads(ask(capsys, "analyze", run, "--data", data, "--output", tmp_path / "out", "--extremes", 0, "--json"))
    assert (found["top1"], found["loss"], found["labelled"], found["images"]) == (None, None, 0, 5)
    needed = "no label; expected 0000.cls" if kind == "shard" else "holds no class folders"
    assert needed in refuse(capsys, "evaluate", run, "--data", data)  # which needs labels


@pytest.mark.parametrize("weighting", ["learned", "fixed"])
def test_weights_that_follow_no_image(images, tmp_path, capsys, weighting):
    run = write_checkpoint(tmp_path / "run", "dg_resnet20", images, {**OPTIONS, "weighting": weighting})
    output = ask(capsys, "analyze", run, "--extremes", 1)
    found = names(run / "analysis")  # where it is written by default
    assert {"mean.png", "mean.svg", "graphs_easiest.png", "edges.csv", "images.csv", "analysis.json"} <= found
    assert not any(name.startswith(("std", "open", "class_", "embedding", "graphs_cheapest")) for name in found)
    assert "no weight depends on the image" in output
    assert "(5)" in output
    assert ": holds." not in output


def write_run(folder: Path, config: dict[str, object], losses: list[float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [f"{epoch},{9 * epoch},{loss},{'' if epoch % 2 else 50 + epoch}" for epoch, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,step,train_loss,val_top1", *rows]))
    return folder


def test_curves_of_several_runs(tmp_path, capsys):
    bias = [
        write_run(tmp_path / f"b{b}", {"model_kwargs": {"router_bias": b}, "output": str(b)}, [2.0, 1.0, 0.5]) for b in (3, 0)
    ]
    output = ask(capsys, "analyze", "--curves", *bias, "--output", tmp_path / "out")
    assert names(tmp_path / "out") == {"curves.png", "curves.svg", "curves.csv"}
    assert "curves.png" in output
    rows = read_table(tmp_path / "out" / "curves.csv")
    assert [(row["run"], row["epoch"], row["top1"]) for row in rows[:3]] == [
        ("router_bias 3", "1", "50.0"),
        ("router_bias 3", "2", ""),
        ("router_bias 3", "3", "52.0"),
    ]
    text = (tmp_path / "out" / "curves.svg").read_text(encoding="utf-8")
    assert "router_bias 0, top-1 52.00 %" in text
    (bias[0] / "metrics.csv").write_text("epoch,step,train_loss\n0,1,much\n")
    assert "metrics.csv: row 1: train_loss must be a number, got 'much'" in refuse(
        capsys, "analyze", "--curves", *bias, "--output", tmp_path / "out"
    )


def test_runs_that_do_not_differ_go_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / name, {"seed": 1}, [1.0]) for name in ("a", "b")]
    assert name_runs(runs) == ["a", "b"]
    (runs[0] / "config.yaml").unlink()
    assert name_runs(runs) == ["a", "b"]
