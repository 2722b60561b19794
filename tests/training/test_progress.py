from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from dgnet.training._progress import Pace, Progress

EPOCHS, BATCHES = 3, 4


class Module:
    """What Progress asks of a training module."""

    def __init__(self, trainer: SimpleNamespace) -> None:
        self.trainer = trainer

    def describe_epoch(self) -> str:
        return f"epoch {self.trainer.current_epoch + 1}/{EPOCHS}"

    def describe_figures(self, values: dict[str, float], is_evaluated: bool) -> str:
        return "figures"

    def evaluates_in(self, epoch: int) -> bool:
        return True


def train(interval: float) -> None:
    """The calls that Lightning makes in a run; the loss of a batch is the number of steps."""
    trainer = SimpleNamespace(is_global_zero=True, estimated_stepping_batches=EPOCHS * BATCHES, global_step=0, world_size=1)
    trainer.train_dataloader, trainer.callback_metrics = SimpleNamespace(waited=0.0), {}
    progress, batch = Progress(), (None, torch.zeros(2))
    progress.interval = interval
    trainer.current_epoch = 0
    module = Module(trainer)
    progress.on_train_start(trainer, module)
    for trainer.current_epoch in range(EPOCHS):
        progress.on_train_epoch_start(trainer, module)
        for index in range(BATCHES):
            progress.on_train_batch_start(trainer, module, batch, index)
            trainer.global_step += 1
            outputs = {"value": torch.tensor(float(trainer.global_step)), "hits": {"top-1": 1}}
            progress.on_train_batch_end(trainer, module, outputs, batch, index)
        progress.on_train_epoch_end(trainer, module)
    progress.teardown(trainer, module, "fit")


@pytest.mark.parametrize("interval", [0.0, 1000.0], ids=["drawn each step", "drawn each epoch"])
def test_label_figures_and_position_of_the_bar_agree(interval: float, capsys: pytest.CaptureFixture[str]) -> None:
    train(interval)
    drawn = capsys.readouterr().err.replace("\r", "\n")
    bars = re.findall(r"epoch (\d)/3:.* (\d+)/12 .*loss ([\d.]+), top-1 50.0 %", drawn)
    positions = [int(position) for _, position, _ in bars]
    assert sorted(set(positions)) == ([*range(1, 13)] if interval == 0 else [4, 8, 12])
    for epoch, position, loss in bars:
        assert int(epoch) == (int(position) - 1) // BATCHES + 1
        assert float(loss) == int(position)


def test_the_share_of_waiting_is_right_if_the_bar_is_drawn_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace, waited, shown = Pace(), 0.0, []
    for _ in range(4):  # each step: 0.5 s of waiting, then 0.5 s of work
        now, waited = now + 0.5, waited + 0.5
        pace.begin(waited)
        now += 0.5
        pace.add(8)
        shown.append(str(pace))
        pace.restart()
    assert shown[1:] == ["8.0 images/s, 50 % waiting for data"] * 3
