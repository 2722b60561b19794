"""The runner and the report of experiments/."""

from __future__ import annotations

import csv
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
import yaml

import dgnet
from dgnet.errors import UsageError
from dgnet.files import lock, read_table, write_table
from dgnet.training import TrainConfig
from tests.helpers.data import jpeg, write_shard
from tests.helpers.networks import build_meta
from tests.helpers.processes import wait_for

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import grid as grids  # noqa: E402
import report  # noqa: E402
import similarity  # noqa: E402

MODELS = {"static": "resnet20", "dynamic": "dg_resnet20"}
RECIPE = {"batch_size": 4, "image_size": 8, "lr": 0.05, "model_kwargs": {"channels": [4, 4, 4]}}
ONE_TRAINING = {"usual": {"model": "dg_resnet20"}, "raw": {"model": "dg_resnet20", "evaluate": {"inference_weight": "raw"}}}


@pytest.fixture
def restores_signals() -> Iterator[None]:
    """A runner takes SIGTERM for itself."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A grid of two arms with two seeds, and its data: dark and light images."""
    shard = [{"jpg": jpeg(200 * (i % 2) + i), "cls": str(i % 2).encode()} for i in range(12)]
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train-000000.tar", shard)
    write_shard(tmp_path / "data" / "test.tar", shard[:6])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    write_grid(tmp_path)
    return tmp_path


def write_grid(folder: Path, **changes: object) -> Path:
    values = {
        "recipe": "recipe.yaml",
        "data": "train-{000000..000000}.tar",
        "test": "test.tar",
        "options": {"epochs": 2, "evaluate_every": 2, "cache": True},
        "groups": {"a": {"seeds": [3, 4], "arms": {arm: {"model": model} for arm, model in MODELS.items()}}},
        "compare": [["static", "dynamic"]],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return folder / "grid.yaml"


def refuse(monkeypatch, capsys, script: str, *arguments: object) -> str:
    """The one line with which a script refuses, run in this process."""
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "experiments" / script), run_name="__main__")
    output, errors = capsys.readouterr()
    assert (caught.value.code, output, errors.count("\n")) == (2, "", 1), errors
    return errors


def call(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "experiments" / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_what_is_missing_is_run_and_what_is_there_is_not(folder):
    command = ("run.py", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs", "--jobs", 2)
    listed = call(*command, "--dry-run").stdout.splitlines()
    assert listed == ["a: static, seed 3", "a: dynamic, seed 3", "a: static, seed 4", "a: dynamic, seed 4"]
    first = call(*command)
    assert first.returncode == 0, first.stderr
    rows = read_table(folder / "results" / "grid.csv")
    assert sorted((row["arm"], row["seed"]) for row in rows) == [
        ("dynamic", "3"),
        ("dynamic", "4"),
        ("static", "3"),
        ("static", "4"),
    ]
    for row in rows:
        assert 0 <= float(row["top1"]) <= 100
        assert (row["top1_mean_adjacency"] != "") == (row["arm"] == "dynamic")
        network = dgnet.create_model(MODELS[row["arm"]], num_classes=2, channels=[4, 4, 4])
        assert int(row["multiply_adds"]) == dgnet.cost(network, 8).multiply_adds  # of the images that it was trained on
    curves = read_table(folder / "results" / "grid_curves.csv")
    assert len(curves) == 4 * 2
    # The last checkpoint's accuracy is the one that training measured at its end; test images were read in no other epoch.
    for row in rows:
        own = [curve for curve in curves if (curve["arm"], curve["seed"]) == (row["arm"], row["seed"])]
        assert [curve["val_top1"] != "" for curve in own] == [False, True]
        assert float(own[1]["val_top1"]) == pytest.approx(float(row["top1"]), abs=1e-3)

    again = call(*command)
    assert again.returncode == 0
    assert read_table(folder / "results" / "grid.csv") == rows
    # One row lost, as by an interruption: that run alone is run again, and gives the same.
    with (folder / "results" / "grid.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row for row in rows if (row["arm"], row["seed"]) != ("dynamic", "3"))
    assert call(*command, "--dry-run").stdout == "a: dynamic, seed 3\n"
    assert call(*command).returncode == 0
    redone = {(row["arm"], row["seed"]): row for row in read_table(folder / "results" / "grid.csv")}
    assert redone["dynamic", "3"]["loss"] == next(r for r in rows if (r["arm"], r["seed"]) == ("dynamic", "3"))["loss"]

    printed = call("report.py", folder / "grid.yaml")
    assert printed.returncode == 0, printed.stderr
    assert "| dynamic − static | 2 |" in printed.stdout
    drawn = [folder / "results" / f"grid_{name}.{ending}" for name in ("accuracy", "curves") for ending in ("png", "svg")]
    before = [path.read_bytes() for path in drawn]
    assert min(map(len, before)) > 1000
    assert call("report.py", folder / "grid.yaml").returncode == 0
    assert [path.read_bytes() for path in drawn] == before  # the same rows, the same files: no change to commit


def test_another_recipe_is_another_run(folder):
    before = grids.read_grid(folder / "grid.yaml")
    rows = [{"digest": run.digest, "arm": run.arm, "seed": run.seed} for run in before.runs]
    write_table(before.table, rows[:3])
    assert [(run.arm, run.seed) for run in grids.missing_runs(before)] == [("dynamic", 4)]
    for change in ({"options": {"epochs": 3}}, {"data": "train-{000000..000001}.tar"}, {"test": "other.tar"}):
        assert len(grids.missing_runs(grids.read_grid(write_grid(folder, **change)))) == 4


@pytest.mark.parametrize("name", ["cifar10", "cifar10_choices"])
def test_the_rows_of_the_shipped_grids_are_found(name):
    grid = grids.read_grid(ROOT / "experiments" / f"{name}.yaml")
    arms = report.collect(grid)
    assert len(arms) >= 10
    assert report.read_curves(grid, arms)


def test_where_the_data_lie_makes_no_other_run(folder):
    run = grids.read_grid(folder / "grid.yaml").runs[0]
    moved = replace(run, options={**run.options, "data": "elsewhere", "threads": 1})
    assert moved.digest == run.digest
    assert replace(run, options={**run.options, "lr": 0.1}).digest != run.digest


def test_arms_that_differ_in_their_evaluation_share_a_training(folder):
    usual, raw = grids.read_grid(write_grid(folder, groups={"a": {"seeds": [3], "arms": ONE_TRAINING}}, compare=[])).runs
    assert usual.name == raw.name
    assert usual.digest != raw.digest
    assert usual.options == raw.options


def test_one_runner_works_on_a_grid(folder, restores_signals, monkeypatch, capsys):
    arguments = (folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs")
    with lock(folder / "grid.yaml", "held"):
        line = refuse(monkeypatch, capsys, "run.py", *arguments)
    assert line == f"run.py: another run.py is already running {folder}/grid.yaml\n"


@pytest.mark.slow
def test_a_terminated_runner_stops_what_it_started_and_goes_on(folder):
    words = ["run.py", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs", "--jobs", 2]
    runner = subprocess.Popen([sys.executable, ROOT / "experiments" / words[0], *map(str, words[1:])])
    wait_for(lambda: len(list((folder / "runs").glob("*/config.yaml"))) == 2, 120)
    runner.terminate()
    assert runner.wait(60) == 143
    for path in (folder / "runs").glob("*/"):
        with lock(path, f"{path} is trained in still"):
            pass
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert len(read_table(folder / "results" / "grid.csv")) == 4


@pytest.mark.slow
def test_one_training_is_evaluated_for_each_of_its_arms(folder):
    write_grid(folder, groups={"a": {"seeds": [3], "arms": ONE_TRAINING}}, compare=[["usual", "raw"]])
    done = call("run.py", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    rows = {row["arm"]: row for row in read_table(folder / "results" / "grid.csv")}
    assert len(list((folder / "runs").glob("*-seed3"))) == 1
    assert rows["usual"]["train_loss"] == rows["raw"]["train_loss"]
    assert rows["usual"]["weight_std"] != rows["raw"]["weight_std"]


def test_a_seed_stands_for_the_runs_own(folder):
    arm = {"model": "randwire_small_er", "model_kwargs": {"topology_seed": "$seed", "channels": 8}}
    grid = grids.read_grid(write_grid(folder, groups={"a": {"seeds": [3, 4], "arms": {"er": arm}}}, compare=[]))
    assert [run.options["model_kwargs"]["topology_seed"] for run in grid.runs] == [3, 4]


@pytest.mark.slow
def test_without_test_images_a_run_is_judged_on_those_it_holds_out(folder):
    arms = {"dynamic": {"model": "dg_resnet20"}}
    options = {"epochs": 1, "holdout": 4}
    write_grid(folder, test=None, options=options, groups={"a": {"seeds": [3], "arms": arms}}, compare=[])
    (folder / "data" / "test.tar").unlink()
    done = call("run.py", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs")
    assert done.returncode == 0, done.stderr
    (row,) = read_table(folder / "results" / "grid.csv")
    assert row["images"] == "4"
    assert "held-out top-1 %" in call("report.py", folder / "grid.yaml").stdout


def test_an_arm_far_below_the_others_does_not_squeeze_the_picture(folder):
    grid = grids.read_grid(folder / "grid.yaml")
    arms = {name: {3: {"top1": str(top1)}} for name, top1 in (("static", 80.0), ("dynamic", 81.0), ("raw", 30.0))}
    (axes,) = report.draw_accuracy(grid, arms).axes
    assert axes.get_xlim()[0] > 75
    assert [text.get_text() for text in axes.texts] == ["← 30.00"]
    assert len(axes.lines) == 2 * 2


def test_the_interval_is_that_of_a_paired_t_test():
    first = {seed: {"top1": str(value)} for seed, value in enumerate([80.0, 81.0, 79.5, 80.2])}
    second = {seed: {"top1": str(value)} for seed, value in enumerate([80.9, 81.2, 80.6, 80.1, 99.0])}
    pairs, mean, half = report.difference(first, second)
    ours = [80.9, 81.2, 80.6, 80.1]
    expected = scipy.stats.ttest_rel(ours, [80.0, 81.0, 79.5, 80.2]).confidence_interval(0.95)
    assert pairs == 4
    assert (mean - half, mean + half) == pytest.approx(tuple(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "absent.yaml"}, "is not a valid grid"),
        ({"groups": None}, "is not a valid grid"),
        ({"image_size": 8}, "unknown key 'image_size'; keys: compare, data, groups, options, recipe, test"),
        ({"test": None}, "arm 'static' needs either `test` in the grid or `holdout` among its options, not both"),
        ({"options": {"holdout": 4}}, "arm 'static' needs either `test` in the grid or `holdout`"),
        ({"compare": [["static", "fixed"]]}, "compares 'fixed', which is not an arm"),
        (
            {"groups": {g: {"seeds": [3], "arms": {"static": {"model": "resnet20"}}} for g in "ab"}, "compare": []},
            "arm 'static' with seed 3 is in two groups: a, b",
        ),
    ],
    ids=str,
)
def test_grids_that_cannot_be(folder, changes, message):
    with pytest.raises(UsageError, match=message):
        grids.read_grid(write_grid(folder, **changes))


def test_mistakes_end_in_one_line(folder, restores_signals, monkeypatch, capsys):
    for arguments, message in [
        ((folder / "absent.yaml", "--data", folder / "data"), "absent.yaml is not a valid grid"),
        ((folder / "grid.yaml", "--data", folder / "nowhere"), "train-000000.tar does not exist"),
        ((folder / "grid.yaml", "--data", folder / "data", "--groups", "b"), "unknown group 'b'; groups of"),
    ]:
        assert message in refuse(monkeypatch, capsys, "run.py", *arguments)
    assert "holds no finished run of" in refuse(monkeypatch, capsys, "report.py", folder / "grid.yaml")


@pytest.mark.slow
def test_every_arm_of_the_grids_in_the_repository_is_a_network_that_can_be_built():
    networks: dict[str, TrainConfig] = {}  # an arm's seeds train one network
    for path in (ROOT / "experiments").glob("*.yaml"):
        for run in grids.read_grid(path).runs:
            config = TrainConfig(**{**run.options, "val_data": None})
            networks[repr((config.model, config.network_kwargs))] = config
            json.dumps(run.options)
    for config in networks.values():
        build_meta(config.model, **config.network_kwargs)


def test_nodes_that_read_the_same_are_alike_and_others_less():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    for sender, receiver in [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4)]:
        mask[receiver, sender] = True
    torch.manual_seed(0)
    network = dgnet.create_model("dg_resnet20", channels=[4, 4, 4], topology=mask, weighting="fixed").eval()
    first, *others = similarity.similarity(network, torch.randn(3, 3, 8, 8))
    assert others == [pytest.approx((1, 1))] * 2  # the third reads what the second does; the first reads a larger map
    assert 0 < first[1] < first[0] < 0.999
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_what_is_no_run_has_no_similarity(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["similarity.py", str(tmp_path / "nothing")])
    assert similarity.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
