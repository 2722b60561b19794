"""What launchers (torchrun, SLURM, others) say in the environment, checked before Lightning and torch read it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dgnet.errors import UsageError

_NUMBERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_ID"),
    *("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
)
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
# A variable -> the number of processes, which is larger.
_SIZES = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError for a variable of a launcher that is no number, is missing, or contradicts another."""
    values = {name: environment[name] for name in _NUMBERS if name in environment}
    for name, value in values.items():
        if not value.isascii() or not value.isdigit() or len(value) > 12:
            raise UsageError(f"the environment variable {name} must be a whole number, got {value!r}; unset or correct it")
    if "TORCHELASTIC_RUN_ID" in environment:
        _require("torchrun", "TORCHELASTIC_RUN_ID", _TORCHRUN, environment)
    if "RANK" in values and int(values["RANK"]) and "WORLD_SIZE" not in values:
        raise UsageError(f"RANK is {values['RANK']}, but WORLD_SIZE is not set: start the command with torchrun, or unset RANK")
    for name, size in _SIZES.items():
        if name in values and size in values and int(values[name]) >= int(values[size]):
            raise UsageError(f"{name} is {values[name]}, but must be below {size}, {values[size]}; unset or correct them")
    if "TORCHELASTIC_RUN_ID" in environment and int(values["WORLD_SIZE"]) % int(values["LOCAL_WORLD_SIZE"]):
        raise UsageError(
            f"WORLD_SIZE {values['WORLD_SIZE']} is not a multiple of LOCAL_WORLD_SIZE {values['LOCAL_WORLD_SIZE']}:"
            " every machine needs the same number of processes"
        )


def check_slurm(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError if a task of SLURM is not told its place; for processes that SLURM has started."""
    _require("srun", "SLURM_NTASKS", _SRUN, environment)


def _require(launcher: str, sign: str, names: tuple[str, ...], environment: Mapping[str, str]) -> None:
    """Raises UsageError if one of `names` is missing, although `sign` says that `launcher` started the process."""
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UsageError(f"{sign} is set, but not {', '.join(missing)}: start the command with {launcher}, or unset {sign}")
