"""`dgnet experiment run`: what is missing is run, whatever interrupts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dgnet
from dgnet.cli import main
from dgnet.experiments import read_grid
from dgnet.experiments._runner import list_gpus
from dgnet.files import lock, read_table, write_table
from tests.helpers.command import ask, refuse
from tests.helpers.data import write_folder
from tests.helpers.grids import MODELS, ONE_TRAINING, one_group, write_grid
from tests.helpers.own_code import HALVES
from tests.helpers.processes import wait_for


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["arm"], row["seed"]): row for row in read_table(folder / "results" / "grid.csv")}


@pytest.mark.slow
def test_what_is_missing_is_run_and_what_is_there_is_not(folder, capsys):
    groups = {"a": {"seeds": [3], "arms": {arm: {"model": model} for arm, model in MODELS.items()}}}
    write_grid(folder, groups=groups)
    command = ("experiment", "run", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs", "--jobs", 2)
    assert ask(capsys, *command, "--dry-run").splitlines() == ["a: static, seed 3", "a: dynamic, seed 3"]
    ask(capsys, *command)
    rows = rows_of(folder)
    assert sorted(rows) == [("dynamic", "3"), ("static", "3")]
    curves = read_table(folder / "results" / "grid_curves.csv")
    assert len(curves) == 2 * 2
    for (arm, seed), row in rows.items():
        assert 0 <= float(row["top1"]) <= 100
        assert (row["top1_mean_adjacency"] != "") == (arm == "dynamic")
        network = dgnet.create_model(MODELS[arm], num_classes=2, channels=[4, 4, 4])
        assert int(row["multiply_adds"]) == dgnet.cost(network, 8).multiply_adds  # of the images that it was trained on
        # The last checkpoint's accuracy is the one that training measured at its end; test images were read in no other epoch.
        own = [curve for curve in curves if (curve["arm"], curve["seed"]) == (arm, seed)]
        assert [curve["val_top1"] != "" for curve in own] == [False, True]
        assert float(own[1]["val_top1"]) == pytest.approx(float(row["top1"]), abs=1e-3)

    # One row lost, as by an interruption: that run alone is run again, and gives the same.
    write_table(folder / "results" / "grid.csv", [rows["static", "3"]])
    assert ask(capsys, *command, "--dry-run") == "a: dynamic, seed 3\n"
    ask(capsys, *command)
    assert rows_of(folder)["dynamic", "3"]["loss"] == rows["dynamic", "3"]["loss"]

    assert "| dynamic − static | 1 |" in ask(capsys, "experiment", "report", folder / "grid.yaml")
    drawn = [folder / "results" / f"grid_{name}.{ending}" for name in ("accuracy", "curves") for ending in ("png", "svg")]
    before = [path.read_bytes() for path in drawn]
    assert min(map(len, before)) > 1000
    ask(capsys, "experiment", "report", folder / "grid.yaml")
    assert [path.read_bytes() for path in drawn] == before  # the same rows, the same files: no change to commit


@pytest.mark.slow
def test_a_weighting_of_ones_own_on_class_folders_is_interrupted_and_goes_on(folder, monkeypatch, capsys):
    """A grid as a researcher writes it: own code as an arm, photos in class folders, terminated, started again, reported."""
    (folder / "packages").mkdir()
    (folder / "packages" / "own_grid_weighting.py").write_text(HALVES)
    for split, images in (("train", 8), ("val", 4)):
        write_folder(folder / "data" / "photos" / split, {"ant": images, "cat": images})
    arms = {"learned": {"weighting": "learned"}, "own": {"weighting": "own_grid_weighting.Halves"}}
    options = {"model": "dg_resnet20", "epochs": 8, "evaluate_every": 8, "checkpoint_every": "1 steps"}
    write_grid(folder, data="photos", test=..., options=options, **one_group(arms) | {"compare": [["learned", "own"]]})
    learned, _ = read_grid(folder / "grid.yaml").runs  # as another machine has run it
    finished = {"arm": "learned", "seed": "3", "digest": learned.digest, "epochs": "8", "top1": "50.0"}
    write_table(folder / "results" / "grid.csv", [finished])
    words = ["experiment", "run", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs", "--jobs", 2]
    words += ["--import", "own_grid_weighting"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "packages"), *sys.path]))
    monkeypatch.syspath_prepend(folder / "packages")
    command = [sys.executable, "-m", "dgnet", *map(str, words)]
    runner = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = folder / "runs"
    wait_for(lambda: runner.poll() is not None or any(begun.glob("*/checkpoints/last.ckpt")), 300)
    runner.terminate()
    assert runner.communicate(timeout=300)[1].endswith("dgnet: interrupted; type the same command again to continue\n")
    assert runner.returncode == 143
    (run,) = begun.glob("*/")
    with lock(run, f"{run} is trained in still"):
        pass
    assert sorted(rows_of(folder)) == [("learned", "3")]

    ask(capsys, *words)
    rows = rows_of(folder)
    assert sorted(rows) == [("learned", "3"), ("own", "3")]
    assert rows["own", "3"]["minutes"] == ""  # it was continued, not begun again
    assert rows["own", "3"]["images"] == "8"
    assert "| own − learned | 1 |" in ask(capsys, "experiment", "report", folder / "grid.yaml", "--formats", "pdf")
    assert (folder / "results" / "grid_accuracy.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_one_training_is_evaluated_for_each_of_its_arms_on_images_that_it_holds_out(folder, capsys):
    """The grid names no test images, and no folder has any."""
    write_grid(folder, test=..., options={"epochs": 1, "holdout": 4}, **one_group(ONE_TRAINING))
    (folder / "data" / "test.tar").unlink()
    ask(capsys, "experiment", "run", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs", "--jobs", 2)
    rows = {row["arm"]: row for row in read_table(folder / "results" / "grid.csv")}
    assert len(list((folder / "runs").glob("*-seed3"))) == 1
    assert rows["usual"]["train_loss"] == rows["raw"]["train_loss"]
    assert rows["usual"]["weight_std"] != rows["raw"]["weight_std"]
    assert {row["images"] for row in rows.values()} == {"4"}
    assert "held-out top-1 %" in ask(capsys, "experiment", "report", folder / "grid.yaml")


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_reason(folder, capfd):
    """Its folder holds something else already."""
    write_grid(folder, **one_group({"static": {"model": "resnet20"}}))
    ask(capfd, "experiment", "run", folder / "grid.yaml", "--dry-run")
    name = next(run.name for run in read_grid(folder / "grid.yaml").runs)
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / "notes.txt").touch()
    words = ["experiment", "run", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs"]
    assert main([str(word) for word in words]) == 1
    errors = capfd.readouterr().err
    assert f"dgnet train exited with status 2: --output {folder}/runs/{name} already is not empty" in errors
    assert "dgnet: 1 of 1 runs failed; type the same command again" in errors


def test_one_runner_works_on_a_grid(folder, capsys):
    words = ("experiment", "run", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs")
    with lock(folder / "grid.yaml", "held"):
        line = refuse(capsys, *words)
    assert line == f"dgnet: another dgnet experiment run is already running {folder}/grid.yaml\n"


@pytest.mark.parametrize(
    ("visible", "count", "expected"), [("", 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-a", 1, ["GPU-a"]), ("-1", 0, [])]
)
def test_each_gpu_that_may_be_used_gets_runs(visible, count, expected):
    assert list_gpus({"CUDA_VISIBLE_DEVICES": visible}, count) == expected
