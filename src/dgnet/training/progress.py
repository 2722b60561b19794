"""Progress on stderr: one bar over the whole run, and a line an epoch."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from tqdm import tqdm


class Progress(L.Callback):
    """A bar with loss, training accuracy and the time left of the whole run; one line for each epoch."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        # A log file gets a line every half minute, a terminal a bar that moves.
        self.interval = 0.2 if sys.stderr.isatty() else 30.0
        self.shown = 0.0
        self.correct: Any = 0  # of this process's images in the epoch; the metrics would wait for other processes
        self.images = 0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.correct, self.images = 0, 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            total = int(trainer.estimated_stepping_batches)
            self.bar = tqdm(total=total, initial=trainer.global_step, unit="step", mininterval=self.interval)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.bar is None:
            return
        self.correct = self.correct + outputs["correct"]
        self.images += len(batch[1])
        if time.monotonic() - self.shown >= self.interval:
            self.shown = time.monotonic()
            loss, top1 = float(outputs["loss"]), float(self.correct) / self.images
            self.bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}, top-1 {100 * top1:.1f} %", refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if self.bar is None:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        line = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}:"
        line += f" train loss {values['train_loss']:.3f}, top-1 {values['train_top1']:.2f} %"
        if module.evaluates_in(trainer.current_epoch):
            line += f"; val loss {values['val_loss']:.3f}, top-1 {values['val_top1']:.2f} %"
            if "val_executed" in values:
                line += f", executed {values['val_executed']:.3f} of the dense cost"
        tqdm.write(line, file=sys.stderr)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
