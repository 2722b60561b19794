"""Training as a user types it: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.data import TRAIN, hold_out, open_dataset
from dgnet.errors import UsageError
from dgnet.files import lock, read_table
from dgnet.training import TrainConfig
from dgnet.training._module import Classifier
from tests.helpers.command import QUICK, ask, refuse
from tests.helpers.data import write_folder


def test_a_run_folder_holds_what_is_promised(run):
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "data.json",
        "metrics.csv",
        "tensorboard",
        "checkpoints",
        "model.safetensors",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["epochs"] == 2
    resolved = {"weight_decay": 5e-4, "augment": "pad-crop", "image_size": 8, "topology": "complete", "weighting": "routed"}
    assert {name: config[name] for name in resolved} == resolved  # not only what was typed
    assert config["model_kwargs"]["router_bias"] == 3.0
    assert "learned_start" not in config["model_kwargs"]  # of another weighting
    rows = read_table(run / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train_loss", "train_top1", "val_loss", "val_top1", "lr"} <= set(rows[0])
    assert float(rows[0]["lr"]) == pytest.approx(0.05 * 7 / 9)  # of the third of three warm-up steps from a third of it
    assert list((run / "tensorboard").glob("events*"))


def test_every_file_of_a_run_may_be_read_as_the_umask_allows(run):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_training_says_how_it_went_and_how_to_evaluate(images, tmp_path, capsys):
    output = ask(capsys, "train", "--data", images, "--epochs", 1, "--output", tmp_path / "b", *QUICK)
    assert output.startswith("top-1 ")
    assert output.splitlines()[-1] == f"evaluate it: dgnet evaluate {tmp_path / 'b'}"


def test_a_run_can_be_repeated_from_its_configuration(run, tmp_path, capsys):
    ask(capsys, "train", "--config", run / "config.yaml", "--output", tmp_path / "again")
    first, second = load_checkpoint(run), load_checkpoint(tmp_path / "again")
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(first.state_dict[name], second.state_dict[name]) for name in first.state_dict)


def test_the_seed_matters(run, tmp_path, capsys):
    ask(capsys, "train", "--config", run / "config.yaml", "--seed", 1, "--output", tmp_path / "other")
    first, second = load_checkpoint(run), load_checkpoint(tmp_path / "other")
    assert not torch.equal(first.state_dict["conv1.weight"], second.state_dict["conv1.weight"])


@pytest.mark.slow
def test_a_trained_network_is_fine_tuned_to_a_budget(run, images, tmp_path, capsys):
    budgeted = tmp_path / "budgeted"
    options = ["--epochs", 1, "--batch-size", 6, "--image-size", 8, "--model-kwargs", '{"channels": [4, 4, 4]}']
    weights = run / "model.safetensors"
    assert (
        main(list(map(str, ["train", "--data", images, "--weights", weights, "--budget", 0.7, "--output", budgeted, *options])))
        == 0
    )
    assert "stayed as initialised: layer1.node_gates.bias" in capsys.readouterr().err
    assert "executed multiply-adds" in ask(capsys, "evaluate", budgeted, "--mode", "sparse")
    words = ["train", "--data", images, "--output", tmp_path / "other", *options]
    assert "--budget must be 0 to 1, got 1.5" in refuse(capsys, *words, "--budget", 1.5)
    assert "is less than what always runs" in refuse(capsys, *words, "--budget", 0.001)
    assert "needs a network with dynamic stages" in refuse(capsys, *words, "--budget", 0.5, "--model", "resnet20")


def test_a_random_graph_travels_with_its_checkpoint(images, tmp_path, monkeypatch, capsys):
    kwargs = "{num_blocks: 5, channels: 4, head_channels: 8, topology_seed: 3}"
    options = ["--epochs", 1, "--image-size", 32, "--batch-size", 4, "--model-kwargs", kwargs, "--output", tmp_path / "run"]
    ask(capsys, "train", "--data", images, "--model", "randwire_small_er", *options)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["topology"] == "er"
    assert config["model_kwargs"]["topology_seed"] == 3
    monkeypatch.setattr("networkx.erdos_renyi_graph", None)  # another version may draw another graph
    assert json.loads(ask(capsys, "evaluate", tmp_path / "run", "--json"))["images"] == 6


def test_images_held_out_of_training_are_those_evaluated(run, images, tmp_path, capsys):
    options = ["--data", images / "train", "--holdout", 5, "--epochs", 1, *QUICK]
    ask(capsys, "train", *options, "--output", tmp_path / "a")
    (row,) = read_table(tmp_path / "a" / "metrics.csv")
    result = json.loads(ask(capsys, "evaluate", tmp_path / "a", "--json"))
    assert result["images"] == 5
    assert result["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)
    assert f"on 5 held-out images of {images / 'train'}, 5 images" in ask(capsys, "evaluate", tmp_path / "a")
    assert json.loads(ask(capsys, "evaluate", tmp_path / "a", "--data", images, "--json"))["images"] == 6
    # The same images, whatever the seed: what is chosen on them is chosen on one set.
    train, held = hold_out(open_dataset(str(images / "train"), TRAIN), 5)
    assert (len(train), len(held)) == (7, 5)
    assert {train.name(i) for i in range(7)} | {held.name(i) for i in range(5)} == {
        str(path) for path in (images / "train").rglob("*.jpg")
    }
    again = hold_out(open_dataset(str(images / "train"), TRAIN), 5)[1]
    assert [again.name(i) for i in range(5)] == [held.name(i) for i in range(5)]


@pytest.mark.slow
def test_evaluation_may_wait_for_the_last_epoch(images, tmp_path, capsys):
    options = ["--data", images, "--epochs", 4, *QUICK]
    for every in (1, 2, 4):
        ask(capsys, "train", *options, "--evaluate-every", every, "--output", tmp_path / str(every))
    each, second, last = (read_table(tmp_path / str(every) / "metrics.csv") for every in (1, 2, 4))
    assert [[row["val_loss"] != "" for row in rows] for rows in (each, second, last)] == [
        [True] * 4,
        [False, True] * 2,
        [False] * 3 + [True],
    ]
    for rows in (second, last):  # training goes the same way, and each epoch's figures are its own
        assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in each]
        assert rows[-1]["val_loss"] == each[-1]["val_loss"]
    assert (tmp_path / "4" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_decoding_once_trains_as_well(images, tmp_path, capsys):
    options = ["--data", images, "--epochs", 20, *QUICK, "--augment", "pad-crop", "--hflip", 0.5]
    output = ask(capsys, "train", *options, "--cache", "true", "--output", tmp_path / "run")
    assert float(output.split()[1]) > 80  # of six images
    row = read_table(tmp_path / "run" / "metrics.csv")[-1]
    result = json.loads(ask(capsys, "evaluate", tmp_path / "run", "--json"))  # through the ordinary loader
    assert result["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-3)


@pytest.mark.slow
def test_a_moving_average_is_what_is_evaluated_and_saved(images, tmp_path, capsys):
    run = tmp_path / "run"
    ask(capsys, "train", "--data", images, "--epochs", 3, "--ema", 0.5, "--clip-grad", 1, "--output", run, *QUICK)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    saved = load_checkpoint(run / "model.safetensors").state_dict
    assert all(torch.equal(averaged[f"network.{name}"], tensor) for name, tensor in saved.items())
    assert any(not torch.equal(averaged[name], current[name]) for name in current)
    result = json.loads(ask(capsys, "evaluate", run, "--json"))
    assert result["loss"] == pytest.approx(float(read_table(run / "metrics.csv")[-1]["val_loss"]), abs=1e-5)


def test_lightnings_loggers_come_from_the_recipe(images, tmp_path, capsys):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "mine")}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"loggers": [logger], "epochs": 1, "data": str(images), "output": str(tmp_path / "run")}))
    ask(capsys, "train", "--config", recipe, *QUICK)
    assert "val_top1" in next((tmp_path / "mine").rglob("metrics.csv")).read_text()
    for path, why in (("lightning.Trainer", "is not a Lightning logger"), ("nowhere.Logger", "No module named 'nowhere'")):
        recipe.write_text(yaml.safe_dump({"loggers": [{"class_path": path}], "data": str(images)}))
        line = refuse(capsys, "train", "--config", recipe, "--output", tmp_path / "other", *QUICK)
        assert f"--loggers: {path} cannot be built" in line
        assert why in line


@pytest.mark.slow
def test_digits_are_learned(tmp_path, capsys):
    """The default run in two epochs, at a higher rate."""
    words = ["--epochs", 2, "--cache", "true", "--lr", 0.3, "--output", tmp_path / "digits"]
    output = ask(capsys, "train", *words)
    assert float(output.split()[1]) > 60


# Bad input: exit status 2, one line that says what to do, nothing lost.


def test_a_run_is_never_overwritten(run, images, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    line = refuse(capsys, "train", "--data", images, "--output", run, *QUICK)
    assert "already holds a run; name another folder" in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_default_run_folder_is_the_next_free_one(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert f"runs/dg_resnet20-{number}" in ask(capsys, "train", "--data", images, "--epochs", 1, *QUICK)


def test_one_process_trains_in_a_folder(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dgnet.training._folder.PATIENCE", 0.2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    folder = tmp_path / "run"
    options = ["--data", images, "--epochs", 1, "--threads", 1, "--output", folder, *QUICK]
    threads = torch.get_num_threads()
    folder.mkdir()
    with lock(folder, "held"):
        assert "another process trains in" in refuse(capsys, "train", *options)
    ask(capsys, "train", *options)
    assert os.environ["OMP_NUM_THREADS"] == "1"  # what Lightning gives further processes
    torch.set_num_threads(threads)
    (folder / "metrics.csv").unlink()  # the run goes on
    with lock(folder, "held"):
        assert "another process trains in" in refuse(capsys, "train", "--resume", folder)


def test_slurm_starts_as_many_tasks_as_the_run_has_processes(images, tmp_path, capsys, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    line = refuse(capsys, "train", "--data", images, "--accelerator", "cpu", "--output", tmp_path / "run", *QUICK)
    assert "--devices 1 --nodes 1 make 1 processes, and SLURM started 2 tasks" in line
    assert not (tmp_path / "run").exists()


def test_an_image_that_does_not_decode_ends_training(images, tmp_path, capsys):
    write_folder(tmp_path / "data", {"a": 4, "b": 4})
    (tmp_path / "data" / "a" / "2.jpg").write_bytes(b"no image")
    data = ["--data", tmp_path / "data", "--val-data", tmp_path / "data"]
    capsys.readouterr()
    assert main([str(a) for a in ["train", *data, "--output", tmp_path / "run", *QUICK]]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path}/data/a/2.jpg does not decode as an image (no known image format)" in last
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()  # an empty folder of the user's own stays
    assert main([str(a) for a in ["train", *data, "--output", tmp_path / "mine", *QUICK]]) == 2
    assert list((tmp_path / "mine").iterdir()) == []


def test_interrupted_training_ends_with_130(images, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Classifier, "training_step", interrupt)
    try:
        assert main([str(a) for a in ["train", "--data", images, "--output", tmp_path / "run", *QUICK]]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.endswith("dgnet: interrupted\n")


@pytest.mark.slow
def test_two_processes_write_one_run(images, tmp_path):
    options = ["--epochs", "2", "--accelerator", "cpu", "--devices", "2", "--output", str(tmp_path / "run")]
    command = [sys.executable, "-m", "dgnet", "train", "--data", str(images), *options, *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    assert [row["epoch"] for row in read_table(tmp_path / "run" / "metrics.csv")] == ["0", "1"]
    assert load_checkpoint(tmp_path / "run").config["devices"] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("broken", range(2))  # an image of each process
def test_whichever_process_meets_an_image_that_does_not_decode_it_is_one_line(broken, tmp_path):
    write_folder(tmp_path / "data", {"a": 2, "b": 2})
    path = sorted((tmp_path / "data").rglob("*.jpg"))[broken]
    path.write_bytes(b"no image")
    options = ["--val-data", tmp_path / "data", "--accelerator", "cpu", "--devices", "2", "--output", tmp_path / "run"]
    command = [sys.executable, "-m", "dgnet", "train", "--data", tmp_path / "data", *options, *QUICK]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert f"{path} does not decode as an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_batch_is_divided_among_devices(images, tmp_path, capsys):
    options = ["--accelerator", "cpu", "--devices", 2, "--output", tmp_path / "run", *QUICK, "--batch-size", 3]
    line = refuse(capsys, "train", "--data", images, *options)
    assert "--batch-size 3 cannot be divided among 2 devices" in line
    assert not (tmp_path / "run").exists()


def test_model_options_that_a_checkpoint_cannot_carry():
    for value in (nn.Identity, [torch.zeros(1)], {"a": 1j}):
        with pytest.raises(UsageError, match="a checkpoint carries plain values only"):
            TrainConfig(model_kwargs={"router": value})
