"""Private names of Lightning."""

from __future__ import annotations

import subprocess

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def take_sigterm(trainer: L.Trainer) -> bool:
    """Switch off Lightning's handling of SIGTERM; returns whether a SIGTERM has arrived. There is no option for this.

    Lightning handles the signal in the first process only, and before every batch it waits for the device to inform the others.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    has_arrived = trainer.received_sigterm
    trainer._signal_connector.received_sigterm = False
    return has_arrived


def take_processes(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """The other processes that Lightning started on this machine. Afterwards it no longer watches them.

    Otherwise Lightning kills this process if one of them ends. Their launcher is private.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    processes = list(launcher.procs)
    launcher.procs.clear()
    return processes
