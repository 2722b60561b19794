"""Private names of Lightning."""

from __future__ import annotations

import subprocess

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def take_sigterm(trainer: L.Trainer) -> bool:
    """Switch off Lightning's handling of SIGTERM; returns whether one has arrived. No option switches it off.

    Lightning notices a signal in the first process only, and waits for the device before every batch to tell the others.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    has_arrived = trainer.received_sigterm
    trainer._signal_connector.received_sigterm = False
    return has_arrived


def take_processes(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """The further processes that Lightning started on this machine; it no longer watches them. Their launcher is private.

    Lightning kills this process if one of them ends.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    processes = list(launcher.procs)
    launcher.procs.clear()
    return processes
