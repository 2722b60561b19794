"""`dgnet experiment run`: what is missing is run, whatever interrupts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import dgnet
from dgnet.cli import main
from dgnet.experiments import GridRun, Places, read_grid, run_grid
from dgnet.experiments._runner import _Workers, list_gpus
from dgnet.files import lock, read_table, write_table
from tests.helpers.command import ask, refuse
from tests.helpers.data import write_folder
from tests.helpers.grids import CHAIN, MODELS, ONE_TRAINING, one_group, write_grid
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
    assert len(read_table(folder / "results" / "grid_curves.csv")) == 2 * 2  # its old curve is gone

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
def test_a_run_begins_with_the_result_of_an_arm_that_is_named_after_it(folder, capsys):
    arms = {"tuned": {"model": "resnet20", "weights": "$run:static"}, "static": {"model": "resnet20"}}
    write_grid(folder, options={"epochs": 1}, **one_group(arms))
    ask(capsys, "experiment", "run", folder / "grid.yaml", "--data", folder / "data", "--output", folder / "runs", "--jobs", 2)
    assert sorted(rows_of(folder)) == [("static", "3"), ("tuned", "3")]
    static, tuned = (folder / "runs" / run.name for run in read_grid(folder / "grid.yaml").runs)
    assert f"{static}: " in tuned.with_name(f"{tuned.name}.log").read_text()


@pytest.fixture
def run_by(folder, monkeypatch):
    """A function that runs arms with seed 3 without training them. It returns what happened, in order, and how many failed."""

    def run_all(
        arms: dict[str, dict[str, Any]], *, jobs: int = 3, failing: str = "", together: str = "", is_reversed: bool = False
    ) -> tuple[list[str], int]:
        """`failing`: the arm that fails. `together`: the first arm does not end before this one starts."""
        events: list[str] = []

        def run_one(workers: _Workers, run: GridRun, slot: Mapping[str, str]) -> dict[str, Any] | None:
            events.append(f"{run.arm} starts")
            if together and run.arm == next(iter(arms)):
                wait_for(lambda: f"{together} starts" in events, 60)
            else:
                time.sleep(0.1)  # another one could start now
            events.append(f"{run.arm} ends")
            if run.arm == failing:
                workers._report(f"{run.arm} fails")
                return None
            return {"top1": 50}

        monkeypatch.setattr(_Workers, "_run_one", run_one)
        grid = read_grid(write_grid(folder, **one_group(arms)))
        runs = grid.runs[::-1] if is_reversed else grid.runs
        return events, run_grid(grid, runs, Places(folder / "runs", folder / "data"), jobs=jobs)

    return run_all


OTHER = {"model": "resnet20", "lr": 0.1}


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_waits_for_the_one_that_it_begins_with(run_by, jobs, is_reversed):
    events, failed = run_by(CHAIN, jobs=jobs, is_reversed=is_reversed)
    assert events == [f"{arm} {what}" for arm in CHAIN for what in ("starts", "ends")]
    assert failed == 0


def test_other_runs_do_not_wait(run_by):
    events, failed = run_by({**CHAIN, "other": OTHER}, jobs=2, together="other")
    assert len(events) == 8
    assert failed == 0


def test_arms_with_one_training_are_not_trained_at_the_same_time(run_by):
    events, _ = run_by({**ONE_TRAINING, "tuned": {"weights": "$run:usual"}})
    assert [event.split()[0] for event in events] == ["usual", "usual", "raw", "raw", "tuned", "tuned"]


@pytest.mark.parametrize("is_reversed", [False, True])
def test_what_begins_with_a_run_that_failed_fails_too(run_by, is_reversed, capsys):
    events, failed = run_by({**CHAIN, "other": OTHER}, failing="base", is_reversed=is_reversed)
    assert sorted(events) == ["base ends", "base starts", "other ends", "other starts"]
    assert failed == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "begins with" in line]
    assert [line[line.index("dgnet: ") :] for line in lines] == [
        "dgnet: tuned, seed 3 begins with base, whose run failed",
        "dgnet: student, seed 3 begins with tuned, whose run failed",
    ]


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
