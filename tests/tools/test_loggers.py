"""Where the metrics of a run go."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgnet.cli import main
from dgnet.files import read_table
from tests.helpers.command import QUICK, refuse
from tests.helpers.pages import blocks
from tests.helpers.tools import PAGE, require, run_page

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools


def train(photos: Path, recipe: str = "") -> dict[str, list[float]]:
    """Train two epochs with a recipe. The values of each column of metrics.csv."""
    Path("recipe.yaml").write_text(recipe)
    words = ["--config", "recipe.yaml"] if recipe else []
    assert main(["train", *words, "--data", str(photos), "--epochs", "2", "--output", "run", *QUICK]) == 0
    rows = read_table(Path("run/metrics.csv"))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_tensorboard_shows_a_run(photos):
    metrics = train(photos)
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    names = events.Tags()["scalars"]
    assert set(metrics) - {"epoch", "step"} <= set(names)
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(metrics["val_loss"])


def test_tensorboard_shows_a_network():
    run_page("TensorBoard")
    events = EventAccumulator("events")
    events.Reload()
    assert events.Tags()["graph"]
    assert events.Tags()["images"] == ["paths"]


def test_wandb_offline(photos, monkeypatch):
    wandb = require("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = train(photos, *blocks(PAGE, "yaml", "Weights and Biases"))
    wandb.finish()
    wandb.teardown()
    (file,) = Path("wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in ("train_loss", "val_loss", "val_top1", "stage1_threshold"):
        # A name, two bytes of the format, the length of the value, and the value as text.
        found = {float(value) for value in re.findall(name.encode() + rb"\x82\x01.([\d.e+-]+)", content)}
        assert set(metrics[name]) <= found


def test_mlflow(photos, capsys):
    mlflow = require("mlflow")
    (recipe,) = blocks(PAGE, "yaml", "MLflow")
    metrics = train(photos, recipe)
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dgnet").experiment_id])
    for name in ("train_loss", "val_loss", "val_top1", "stage1_threshold"):
        assert [point.value for point in client.get_metric_history(run.info.run_id, name)] == pytest.approx(metrics[name])
    Path("recipe.yaml").write_text(recipe.replace("sqlite:///mlflow.db", "file:./mlruns"))
    line = refuse(capsys, "train", "--config", "recipe.yaml", "--data", photos, "--output", "other", *QUICK)
    assert "MLFlowLogger cannot be built" in line
