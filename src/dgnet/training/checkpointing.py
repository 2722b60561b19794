"""Checkpoints that are whole or not there, and runs that stop when they are told to."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from dgnet.errors import UsageError, reason
from dgnet.files import replace_file

LAST = "last.ckpt"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_EVERY = 10  # steps on a GPU between looks at whether the loss is finite: each look waits for the device


class Interrupted(Exception):  # noqa: N818, the field's word; no error
    """A run was told to stop by a signal and has saved a checkpoint."""

    def __init__(self, signum: int, step: int, folder: Path) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name} after step {step:,}")
        self.signum, self.folder = signum, folder


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames: a checkpoint is the old one or the new one, whatever happens.

    Loads tensors and plain values only. Raises UsageError where the disk is full or the file cannot be written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as written:
                torch.save(checkpoint, written)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
            kept = "the one before it is kept; make room" if path.exists() else "make room"
            raise UsageError(f"checkpoint {path} cannot be written ({reason(error)}): {kept} and go on with --resume") from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return content


class Checkpointing(CheckpointCallback):
    """Writes best.ckpt, and last.ckpt at each epoch's end, every so many steps or seconds, and when told to stop.

    After each step all processes agree on what to do, whichever of them was told: save, stop, or end with an error because a
    loss is not finite. Raises Interrupted in the first case, UsageError in the last.
    """

    def __init__(self, folder: Path, steps: int | None = None, seconds: float | None = None) -> None:
        self.path, self.best_path = folder / LAST, folder / "best.ckpt"
        self.steps, self.seconds = steps, seconds
        self.best_top1 = -1.0  # percent
        self.saved_at = time.monotonic()
        self.signum = 0
        self._group: Any = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU: asking does not wait for a GPU
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's, which knows of SIGTERM in the first process only.
            self._handlers = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        self.saved_at = time.monotonic()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # A second one ends the process at once.
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if (batch_index + 1) % trainer.accumulate_grad_batches:
            return
        step, is_last = trainer.global_step, trainer.is_last_batch
        is_due = step % self.steps == 0 if self.steps else time.monotonic() - self.saved_at >= (self.seconds or float("inf"))
        looks = module.device.type == "cpu" or is_due or is_last or self.signum or step % _LOOK_EVERY == 0
        bad_step = int(module.first_bad_step) if looks else -1
        is_due, signum, bad_step = self._agree(is_due, self.signum, bad_step)
        if bad_step >= 0:
            raise UsageError(self._describe_bad_step(bad_step, module.lr))
        if is_last:  # saved after the evaluation
            self.signum = self.signum or signum
            return
        if is_due or signum:
            self._save(trainer)
        if signum:
            raise Interrupted(signum, step, self.path.parents[1])

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if module.evaluates_in(trainer.current_epoch):
            top1 = float(trainer.callback_metrics["val_top1"])
            is_best, self.best_top1 = top1 > self.best_top1, max(top1, self.best_top1)
            if is_best:
                trainer.save_checkpoint(self.best_path)
        self._save(trainer)
        _, signum, _ = self._agree(False, self.signum, -1)
        if signum:
            raise Interrupted(signum, trainer.global_step, self.path.parents[1])

    def _agree(self, is_due: bool, signum: int, bad_step: int) -> tuple[bool, int, int]:
        """The same answer in every process: the largest of each."""
        if self._group is None:
            return is_due, signum, bad_step
        values = torch.tensor([int(is_due), signum, bad_step])
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        due, signum, bad_step = values.tolist()
        return bool(due), signum, bad_step

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved_at = time.monotonic()

    def _describe_bad_step(self, step: int, lr: float) -> str:
        line = f"the loss of step {step:,} is not finite, at a learning rate of {lr:.3g}; lower --lr, or clip with --clip-grad"
        if self.path.exists():
            return f"{line}, and start from {self.path}, which is from before it, with --weights"
        return f"{line}; no checkpoint was written before it"

    def state_dict(self) -> dict[str, Any]:
        return {"best_top1": self.best_top1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_top1 = state_dict["best_top1"]

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}
