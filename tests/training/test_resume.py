"""Runs that are interrupted, killed, or cut off from their disk, and then continue."""

from __future__ import annotations

import math
import os
import pickle
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dgnet
from dgnet.cli import main
from dgnet.errors import UsageError
from dgnet.training import Interrupted, TrainConfig, read_run, train
from dgnet.training._checkpointing import WholeCheckpointIO
from dgnet.training._data_module import ImageDataModule
from dgnet.training._module import Classifier
from tests.helpers.processes import Run, wait_for
from tests.helpers.runs import assert_same, options


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing disturbs. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(TrainConfig(**options(data, folder, checkpoint_every="15 minutes")))
    return folder


TUNED: dict[str, Any] = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_off_epoch": 3,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "reprob": 0.5,
    "aug_repeats": 2,
    "bce_loss": True,
    "sched": "step",
    "decay_epochs": 1.5,
    "layer_decay": 0.9,
    "router_lr": 0.5,
    "optimizer": "adamw",
    "opt_betas": [0.8, 0.9],
    "clip_grad": 0.1,
    "clip_mode": "agc",
    "freeze": "2",
    "freeze_epochs": 2,
    "teacher": "original",
    "ema": 0.9,
}
"""Options of fine-tuning, all that draw or that change with the epoch. They need --weights."""

CASES = {
    "fine-tuning, workers": {"workers": 2, **TUNED},
    "shards, accumulation": {"source": "shards", "accumulate": 2, "clip_grad": 1.0, "evaluate_every": 2},
    "folder, two ranks, an exact budget": {"ranks": 2, "budget": 0.6, "budget_rule": "exact", "budget_warmup": 0.1},
    "shards, two ranks, a worker, EMA, accumulation": {
        "source": "shards",
        "ranks": 2,
        "workers": 1,
        "ema": 0.9,
        "accumulate": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_again_and_again_a_run_ends_where_it_ends_undisturbed(case, data, tmp_path):
    more = dict(CASES[case])
    ranks, source = more.pop("ranks", 1), more.pop("source", "folder")
    if "teacher" in more:
        more["weights"] = write_static_weights(tmp_path)
    Run(options(data, tmp_path / "first", epochs=1)).start().wait()  # the server of processes has started
    whole = Run(options(data, tmp_path / "whole", source, **more), ranks)
    begin = time.monotonic()
    assert whole.start().wait() == [0] * ranks, whole.log()
    assert whole.log().count(" parameters, on") == 1  # one process of all prints and writes
    duration = time.monotonic() - begin
    rng = random.Random(case)
    kills = 0
    for attempt in range(20):
        run = Run(options(data, tmp_path / f"run-{attempt}", source, **more), ranks)
        while not (run.folder / "model.safetensors").exists():
            run.start()
            run.wait(rng.uniform(0.1, 0.8) * duration if kills < 3 else 120)
            kills += all(status is None for status in run.wait(0))
            run.signal(signal.SIGKILL)
            run.wait()
        assert_same(run.folder, whole.folder, exact=ranks == 1)
        assert not list(run.folder.rglob(".*.part"))
        if kills >= 3:
            return
    raise AssertionError(f"{kills} kills in 20 runs")


def write_static_weights(folder: Path) -> str:
    """Weights of the static network, as a file."""
    torch.manual_seed(0)
    network = dgnet.create_model("resnet20", num_classes=2, channels=(4, 4, 4))
    save_file(network.state_dict(), folder / "static.safetensors")
    return str(folder / "static.safetensors")


# Of 24 steps: in the second epoch with frozen stages, and in the third without.
@pytest.mark.parametrize(("step", "is_cached"), [pytest.param(7, False, marks=pytest.mark.slow), (15, True)])
def test_a_fine_tuned_run_that_is_interrupted_continues_exactly(step, is_cached, data, tmp_path, monkeypatch):
    more = {**TUNED, "weights": write_static_weights(tmp_path), "checkpoint_every": "15 minutes"}
    if is_cached:
        more |= {"cache": True, "auto_augment": None, "reprob": 0.0}
    train(TrainConfig(**options(data, tmp_path / "whole", **more)))
    take_step = Classifier.training_step

    def be_told_to_stop(module: Classifier, *arguments: Any) -> Any:
        if module.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(module, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", be_told_to_stop)
        with pytest.raises(Interrupted, match=f"interrupted by SIGTERM after step {step + 1}"):
            train(TrainConfig(**options(data, tmp_path / "run", **more)))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train(read_run(tmp_path / "run", {}, TrainConfig)[0], tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def saved_step(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


@pytest.mark.parametrize(
    ("signum", "workers"),
    [
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(signum, workers, data, whole, tmp_path):
    run = Run(options(data, tmp_path / "run", workers=workers, checkpoint_every="8 steps")).start()  # of which an epoch has 6
    last = run.folder / "checkpoints" / "last.ckpt"
    wait_for(lambda: last.exists() and saved_step(last) >= 8)
    before = saved_step(last)
    run.signal(signum)
    assert run.wait() == [128 + signum], run.log()
    assert saved_step(last) >= before
    assert run.start().wait() == [0], run.log()
    assert_same(run.folder, whole)


def test_a_signal_during_an_evaluation_ends_it_and_no_step_is_lost(data, whole, tmp_path, monkeypatch):
    config = TrainConfig(**options(data, tmp_path / "run", checkpoint_every="15 minutes"))

    evaluate = Classifier.validation_step

    def be_told_to_stop(module: Classifier, *arguments: Any) -> None:
        evaluate(module, *arguments)
        if module.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "validation_step", be_told_to_stop)
        with pytest.raises(Interrupted, match="interrupted by SIGTERM after step 11") as caught:
            train(config)
    assert caught.value.folder == tmp_path / "run"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert saved_step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 11
    train(*read_run(tmp_path / "run", {}, TrainConfig)[:1], tmp_path / "run")
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_signal_before_the_first_step_is_not_lost(data, tmp_path, monkeypatch):
    prepare = ImageDataModule.val_dataloader

    def be_told_to_stop(module: ImageDataModule) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(module)

    monkeypatch.setattr(ImageDataModule, "val_dataloader", be_told_to_stop)
    with pytest.raises(Interrupted, match=r"interrupted by SIGTERM after step 1$"):
        train(TrainConfig(**options(data, tmp_path / "run")))


def test_one_process_of_two_is_told_to_stop_and_both_do(data, tmp_path):
    run = Run(options(data, tmp_path / "run", epochs=100), ranks=2).start()
    wait_for(lambda: (run.folder / "checkpoints" / "last.ckpt").exists())
    run.signal(signal.SIGTERM, rank=1)
    assert run.wait() == [143, 143], run.log()


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(data, whole, tmp_path):
    run = Run(options(data, tmp_path / "run", checkpoint_every="9 steps", epochs=4)).start()
    last = run.folder / "checkpoints" / "last.ckpt"
    wait_for(last.exists)
    run.signal(signal.SIGKILL)
    run.wait()
    before = last.read_bytes()
    assert run.start(file_bytes=len(before) // 2).wait() == [2], run.log()
    assert "cannot be written" in run.log()
    assert "continue with --resume" in run.log()
    assert last.read_bytes() == before
    assert not list(run.folder.rglob(".*.part"))
    assert run.start().wait() == [0], run.log()
    assert_same(run.folder, whole)


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/last.ckpt cannot be written"):
        WholeCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "file" / "last.ckpt")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match=r"No space left on device.*the one before it is kept"):
        WholeCheckpointIO().save_checkpoint({"step": 2}, path)
    assert WholeCheckpointIO().load_checkpoint(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("values", [1, 1_000_000])
def test_a_full_device_is_told_from_what_cannot_be_saved(values, tmp_path):
    part = tmp_path / ".last.ckpt.part"
    part.symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"last.ckpt cannot be written \(No space left on device\); then continue"):
        WholeCheckpointIO().save_checkpoint({"x": torch.zeros(values)}, tmp_path / "last.ckpt")
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        WholeCheckpointIO().save_checkpoint({"x": lambda: None}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_run_killed_before_its_first_checkpoint_begins_anew(data, tmp_path):
    config = TrainConfig(**options(data, tmp_path / "run", epochs=1))
    expected = train(config).metrics
    for name in ("metrics.csv", "model.safetensors", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        (tmp_path / "run" / name).unlink()
    assert train(*read_run(tmp_path / "run", {}, TrainConfig)[:1], tmp_path / "run").metrics == expected


def test_a_finished_run_says_so(data, tmp_path, capsys):
    train(TrainConfig(**options(data, tmp_path / "run", epochs=1)))
    (tmp_path / "run" / "model.safetensors").unlink()  # as if killed just before the end
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    output, errors = capsys.readouterr()
    assert f"{tmp_path}/run is finished" in errors
    assert "top-1" in output
    assert main(["evaluate", str(tmp_path / "run" / "model.safetensors")]) == 0


def test_what_cannot_be_resumed(data, tmp_path, capsys):
    def refuse(*arguments: object) -> str:
        assert main(["train", *map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "is not a run folder: it holds no config.yaml" in refuse("--resume", tmp_path)
    run = tmp_path / "run"
    train(TrainConfig(**options(data, run, epochs=1)))
    line = refuse("--resume", run, "--lr", "0.3")
    assert "leave out --lr" in line
    assert "leave out --config" in refuse("--resume", run, "--config", "recipe.yaml")
    assert "--resume must not be empty" in refuse("--resume", "")
    assert "--workers" in line
    (run / "metrics.csv").unlink()
    other = f"{data}/val-{{0..1}}.tar"
    line = refuse("--resume", run, "--data", other, "--val-data", other)
    assert "the run was trained on the classes dark, light, and --data has 0, 1" in line
    other = data / "val"
    assert "cannot continue with the 7 of --data" in refuse("--resume", run, "--data", other, "--val-data", other)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert "last.ckpt is damaged" in refuse("--resume", run)
    (run / "config.yaml").write_text("epochs: [")
    assert "config.yaml is not valid YAML" in refuse("--resume", run)


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, capsys):
    from_before = options(data, tmp_path / "run", epochs=2, lr=1e6, optimizer="momentum", warmup_epochs=0.0)
    line = r"the loss of step (\d+) is not finite, at a learning rate of (\d\.?\d*e\+0\d).*--clip-grad"
    with pytest.raises(UsageError, match=line) as raised:
        train(TrainConfig(**from_before))
    step, rate = re.search(line, str(raised.value)).groups()
    # Which step it is depends on rounding; the rate is that of the step: a half-period cosine over twelve steps.
    assert rate == f"{1e6 * (1 + math.cos(math.pi * (int(step) - 1) / 12)) / 2:.3g}"
