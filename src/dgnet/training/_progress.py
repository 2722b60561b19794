"""Progress on stderr: one bar for the whole run, a line for each epoch, and the speed of training."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from tqdm import tqdm

from dgnet._streams import error_stream


class Progress(L.Callback):
    """A bar with the loss, figures of the module, images/s, the share of time spent waiting for data, and the time left.

    The module's training step returns `value`, the loss to show, and `hits`: for each title the number of images of the batch
    that count, out of `len(batch[1])`. Hits are shown as a share of the epoch so far. Speed and waiting are measured since the
    bar was last drawn; `overall` measures them over all training. Evaluation is not counted in either.

    Label, figures and position of the bar change together.
    """

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.stream = error_stream()
        # A terminal shows a moving bar; a log file gets a line every 30 seconds.
        self.interval = 0.2 if self.stream.isatty() else 30.0
        self.sums: dict[str, Any] = {}  # over this process's images only: metrics would wait for the other processes
        self.seen = 0
        self.loss: Any = None  # of the last batch
        self.lately, self.overall = Pace(), Pace()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            total = int(trainer.estimated_stepping_batches)
            self.bar = tqdm(
                desc=module.describe_epoch(), total=total, initial=trainer.global_step, unit="step", file=self.stream
            )

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.sums, self.seen = {}, 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_index: int) -> None:
        waited = trainer.train_dataloader.waited  # type: ignore[union-attr]
        for pace in (self.lately, self.overall):
            pace.begin(waited)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.bar is None:
            return
        self.seen += len(batch[1])
        self.loss = outputs["value"]
        for title, hits in outputs["hits"].items():
            self.sums[title] = self.sums.get(title, 0) + hits
        for pace in (self.lately, self.overall):
            pace.add(len(batch[1]) * trainer.world_size)
        if self.lately.seconds >= self.interval:
            self._set_bar(self.bar, trainer, module)
            self.bar.refresh()

    def _set_bar(self, bar: tqdm[Any], trainer: L.Trainer, module: Any) -> None:
        """Set the bar's label, figures and position; does not draw it."""
        shares = [f"{title} {100 * float(hits) / self.seen:.1f} %" for title, hits in self.sums.items()]
        bar.set_description(module.describe_epoch(), refresh=False)
        bar.set_postfix_str(", ".join([f"loss {float(self.loss):.3f}", *shares, str(self.lately)]), refresh=False)
        bar.n = trainer.global_step
        self.lately.restart()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for pace in (self.lately, self.overall):
            pace.pause()

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        for pace in (self.lately, self.overall):
            pace.pause()
        if self.bar is None:
            return
        if self.lately.images:  # these are not drawn yet; writing the line draws the bar too
            self._set_bar(self.bar, trainer, module)
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        is_evaluated = module.evaluates_in(trainer.current_epoch)
        tqdm.write(f"{module.describe_epoch()}: {module.describe_figures(values, is_evaluated)}", file=self.stream)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            if self.lately.images:  # an interrupted run ends between two drawings
                self._set_bar(self.bar, trainer, module)
            self.bar.close()
            self.bar = None


class Pace:
    """Images, seconds, and seconds spent waiting for data, over a part of training that may be paused."""

    def __init__(self) -> None:
        self.images, self.seconds, self.waited = 0, 0.0, 0.0
        self._start: float | None = None
        self._waited_at = 0.0

    def begin(self, waited: float) -> None:
        """A batch has arrived. `waited`: seconds spent waiting for the loader since the start of training."""
        if self._start is not None:
            self.waited += waited - self._waited_at
        else:
            self._start = time.monotonic()
        self._waited_at = waited

    def add(self, images: int) -> None:
        """A batch is done. `images`: its number of images over all processes."""
        self.images += images
        if self._start is not None:
            now = time.monotonic()
            self.seconds += now - self._start
            self._start = now

    def restart(self) -> None:
        """Count from 0 again. The clock runs on: waiting for the next batch counts too."""
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def pause(self) -> None:
        """Stop the clock until the next batch."""
        self._start = None

    def __str__(self) -> str:
        if not self.seconds:
            return "0 images/s"
        speed = self.images / self.seconds
        return f"{speed:,.{0 if speed >= 10 else 1}f} images/s, {100 * self.waited / self.seconds:.0f} % waiting for data"
