"""Checkpoints that are never half written, and runs that stop after a signal."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from dgnet._streams import is_pipe_closed
from dgnet.compat.lightning import take_sigterm
from dgnet.errors import UsageError, WriteError, reason
from dgnet.files import replace_content
from dgnet.paths import find_kind, is_file

LAST = "last.ckpt"
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))  # not on Windows
_ASKED = (signal.SIGTERM, signal.SIGINT)
_CHECK_LOSS_EVERY = 10  # steps on a GPU between checks that the loss is finite: each check waits for the device


class Interrupted(Exception):  # noqa: N818, it is not an error
    """A signal stopped a run. Its last checkpoint is from `step`, or from an earlier, unknown step if that is None.

    `signum`: SIGINT or SIGTERM. `cause`: what happened instead, if the run was not sent `signum` itself.
    """

    def __init__(self, signum: int, step: int | None, folder: Path, cause: str = "") -> None:
        after = "" if step is None else f" after step {step:,}"
        super().__init__(f"interrupted by {cause or signal.Signals(signum).name}{after}")
        self.signum, self.folder = signum, folder


FINGERPRINT = "fingerprint"
"""The key of a checkpoint's fingerprint. Checkpoints of dgnet 0.1 have none."""


def fingerprint(content: Mapping[str, Any]) -> str:
    """A digest of everything in a run's checkpoint but the values of its tensors.

    A run that continues from other counts, rates or figures would silently give another result.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), list(value.shape)]
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    values = plain({key: value for key, value in content.items() if key != FINGERPRINT})
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the target, syncs it, and renames it: there is always a whole old or new checkpoint.

    Loads tensors and plain values only. Raises UsageError if the file cannot be written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_content(path) as file:
                torch.save({**checkpoint, FINGERPRINT: fingerprint(checkpoint)}, file)
        except OSError as error:
            kept = "the one before it is kept; " if find_kind(path) else ""
            problem = f"checkpoint {path} cannot be written ({reason(error)})"
            raise WriteError(problem, f"{kept}then continue with --resume", error) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return content


class Checkpointing(CheckpointCallback):
    """Writes best.ckpt, and last.ckpt at each epoch's end, every `steps` steps or `seconds` seconds, and after a signal.

    After each step all processes agree on what to do; one of them may have received the signal. last.ckpt is also written one
    step before each evaluation, and a signal during the evaluation ends the run at once.

    A hangup (the terminal was closed) and a closed pipe that the run prints to count as SIGTERM.

    `best`: the metric whose highest value decides best.ckpt.

    Raises Interrupted after a signal, and UsageError if a loss is not finite.
    """

    def __init__(self, folder: Path, best: str, steps: int | None = None, seconds: float | None = None) -> None:
        self.folder = folder
        self.best = best
        self.steps, self.seconds = steps, seconds
        self.best_value = -1.0
        self.best_phase: int | None = None  # see `RunModule.phase`
        self.saved_at = time.monotonic()
        self.is_postponed = False  # whether to write a checkpoint after the next step
        self.signum = 0
        self.cause = ""
        self._group: Any = None
        self._handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}  # Lightning replaces them, then this class
        self.has_started = False  # whether the state of a resumed run has been restored

    @property
    def path(self) -> Path:
        """The last checkpoint."""
        return self.folder / LAST

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.has_started = True
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # the first process chose it
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU: it does not wait for a GPU
        # These handlers replace Lightning's, which Lightning restores at the end of training.
        if take_sigterm(trainer):
            self.signum = signal.SIGTERM
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if self._handlers[signum] != signal.SIG_IGN or signum in _ASKED:  # nohup ignores a hangup
                    signal.signal(signum, self._note)
        self.saved_at = time.monotonic()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum in _ASKED:
            self.signum = signum
        else:
            self._stop(signal.Signals(signum).name)
        # A second signal ends the process at once.
        handler = self._handlers[signum]
        if handler in (signal.SIG_IGN, None):
            handler = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        signal.signal(signum, handler)

    def _stop(self, cause: str) -> None:
        """Stop as after a SIGTERM."""
        if not self.signum:
            self.signum, self.cause = signal.SIGTERM, cause

    def _check_pipe(self) -> None:
        if is_pipe_closed():
            self._stop("a closed pipe")

    def _interrupt(self, signum: int, step: int) -> Interrupted:
        return Interrupted(signum, step, self.folder.parent, self.cause)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if (batch_index + 1) % trainer.accumulate_grad_batches:
            return
        self._check_pipe()
        step, is_last = trainer.global_step, trainer.is_last_batch
        is_evaluated = module.evaluates_in(trainer.current_epoch)
        is_due = step % self.steps == 0 if self.steps else time.monotonic() - self.saved_at >= (self.seconds or float("inf"))
        is_next_evaluated = is_evaluated and batch_index + 1 + trainer.accumulate_grad_batches == trainer.num_training_batches
        due, signum = self._agree(is_due or is_next_evaluated or self.is_postponed, self.signum)
        if module.device.type == "cpu" or due or is_last or signum or step % _CHECK_LOSS_EVERY == 0:
            (bad_step,) = self._agree(int(module.first_bad_step))
            if bad_step >= 0:
                raise UsageError(self._describe_bad_step(bad_step, module.lr))
        if is_last:  # not saved here: a resumed run would skip the evaluation. The step before this one was saved.
            self.signum = signum
            if signum and is_evaluated:
                raise self._interrupt(signum, step - 1)
            return
        if due or signum:
            self._save(trainer)
        if signum:
            raise self._interrupt(signum, step)

    def on_validation_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        self._check_pipe()
        (signum,) = self._agree(self.signum)
        if signum:
            raise self._interrupt(signum, trainer.global_step - 1)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if not module.evaluates_in(trainer.current_epoch):
            self.is_postponed = True  # the epoch's row of metrics is written after this call
            return
        value, phase = float(trainer.callback_metrics[self.best]), module.phase(trainer.current_epoch)
        if phase != self.best_phase:
            self.best_value, self.best_phase = -1.0, phase
        is_best, self.best_value = value > self.best_value, max(value, self.best_value)
        if is_best:
            trainer.save_checkpoint(self.folder / "best.ckpt")
        self._save(trainer)
        self._check_pipe()
        (signum,) = self._agree(self.signum)
        if signum:
            raise self._interrupt(signum, trainer.global_step)

    def _agree(self, *values: int) -> list[int]:
        """The largest value over all processes, for each of `values`."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor([int(value) for value in values])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        agreed: list[int] = tensor.tolist()
        return agreed

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved_at = time.monotonic()
        self.is_postponed = False

    def _describe_bad_step(self, step: int, lr: float) -> str:
        line = f"the loss of step {step:,} is not finite, at a learning rate of {lr:.3g}; lower --lr, or clip with --clip-grad"
        if is_file(self.path):
            return f"{line}, and start from {self.path}, written before that step, with --weights"
        return f"{line}; no checkpoint was written before that step"

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, **({} if self.best_phase is None else {"best_phase": self.best_phase})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_phase = state_dict["best_value"], state_dict.get("best_phase")
