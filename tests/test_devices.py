"""--device, --accelerator and --devices, and what launchers say in the environment: one line for what cannot be used."""

from __future__ import annotations

import pytest
import torch

from dgnet.cli import COMMANDS
from dgnet.cli.command import Group
from dgnet.devices import choose_devices, find_device, list_devices
from dgnet.errors import UsageError
from dgnet.training import TrainConfig, check_launcher
from dgnet.training._launcher import check_slurm
from dgnet.training._trainer import build_trainer
from tests.helpers.command import refuse


@pytest.fixture
def machine(monkeypatch):
    """Sets how many GPUs the machine seems to have, and whether it is a Mac."""

    def pretend(gpus=0, is_mac=False):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_mac)

    return pretend


def test_the_devices_of_machines(machine):
    machine()
    assert list_devices() == ["cpu"]
    machine(2)
    assert list_devices() == ["cpu", "cuda:0", "cuda:1"]
    machine(is_mac=True)
    assert list_devices() == ["cpu", "mps"]


@pytest.mark.parametrize(
    "name",
    [
        "hpu",
        "xla",
        "mps",
        "meta",
        "cuda",
        "cuda:",
        "cuda:0",
        "cuda:99",
        "cpu:5",
        "cpu:-1",
        "CPU",
        "foo",
        "vulkan",
        " cpu",
        "a:b",
    ],
)
def test_a_device_that_the_machine_does_not_have(name, machine):
    machine()
    with pytest.raises(UsageError) as error:
        find_device(name)
    assert str(error.value) == f"--device {name!r} is not on this machine, which has: cpu; auto chooses one"


def test_a_device_that_the_machine_has(machine):
    machine()
    assert find_device("auto") == find_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("gpus", "is_mac", "accelerator", "devices", "chosen"),
    [
        (0, False, "auto", "1", ("cpu", 1)),
        (0, False, "auto", "auto", ("cpu", 1)),
        (0, False, "cpu", "3", ("cpu", 3)),
        (4, False, "auto", "1", ("cuda", 1)),
        (4, False, "auto", "auto", ("cuda", 4)),
        (4, False, "gpu", "4", ("cuda", 4)),
        (4, False, "cuda", "0,2", ("cuda", [0, 2])),
        (4, False, "gpu", "3,", ("cuda", [3])),
        (4, False, "cpu", "2", ("cpu", 2)),
        (0, True, "auto", "1", ("mps", 1)),
        (0, True, "gpu", "auto", ("mps", 1)),
        (0, True, "cpu", "1", ("cpu", 1)),
    ],
)
def test_devices_to_train_on(gpus, is_mac, accelerator, devices, chosen, machine):
    machine(gpus, is_mac)
    assert choose_devices(accelerator, devices) == chosen


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "line"),
    [
        *((0, name, "1", f"unknown --accelerator '{name}'") for name in ("tpu", "hpu", "ipu", "CPU", "foo", "cuda:0")),
        *(
            (0, name, "1", f"--accelerator {name} cannot be used here: this machine has: cpu")
            for name in ("gpu", "cuda", "mps")
        ),
        *(
            (gpus, "auto", text, "--devices must be a number from 1 on, auto, or indices of GPUs")
            for gpus in (0, 2)
            for text in ("foo", "-1", "0", "", "1.5", " 1", "²", "9" * 30, "1;2", ",", "0:1", "None")
        ),
        *((gpus, "auto", "1,1", "are not different GPUs of this machine") for gpus in (0, 2)),
        (0, "cpu", "0,1", "--devices 0,1 are not different GPUs of this machine; this machine has: cpu"),
        (2, "auto", "0,2", "--devices 0,2 are not different GPUs of this machine; this machine has: cpu, cuda:0, cuda:1"),
        (2, "auto", "3", "--devices 3 are more than there are; this machine has: cpu, cuda:0, cuda:1"),
    ],
)
def test_devices_that_the_machine_does_not_have(gpus, accelerator, devices, line, machine):
    machine(gpus)
    with pytest.raises(UsageError) as error:
        choose_devices(accelerator, devices)
    assert line in str(error.value)


def test_half_precision_that_a_cpu_does_not_have(tmp_path):
    with pytest.raises(UsageError, match="--precision fp16 needs a GPU, and this run is on a CPU; use bf16 or 32"):
        build_trainer(TrainConfig(accelerator="cpu", precision="fp16"), tmp_path, None, "top1", None)


def test_a_rank_beyond_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match="LOCAL_RANK is 1, and --devices 1 --nodes 1 make 1 processes"):
        build_trainer(TrainConfig(accelerator="cpu"), tmp_path, None, "top1", None)


TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "run", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
    **{"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}
SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "123"}


@pytest.mark.parametrize(
    "environment",
    [{}, TORCHRUN, SRUN, {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, {"LOCAL_RANK": "1"}, {"MASTER_PORT": "0"}],
)
def test_what_launchers_set_is_accepted(environment):
    check_launcher(environment)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        *(({**TORCHRUN, name: "foo"}, f"variable {name} must be a whole number, got 'foo'") for name in ("RANK", "WORLD_SIZE")),
        *(
            ({name: text}, f"{name} must be a whole number")
            for name in ("LOCAL_RANK", "SLURM_PROCID")
            for text in ("", "-1", "²")
        ),
        ({**TORCHRUN, "MASTER_PORT": "29500x"}, "MASTER_PORT must be a whole number"),
        *(
            ({key: value for key, value in TORCHRUN.items() if key != name}, f"but not {name}: start the command with torchrun")
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        ),
        ({**SRUN, "SLURM_NTASKS": "two"}, "SLURM_NTASKS must be a whole number, got 'two'"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is 4, but must be below WORLD_SIZE, 4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but must be below LOCAL_WORLD_SIZE, 2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "WORLD_SIZE 4 is not a multiple of LOCAL_WORLD_SIZE 3"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "LOCAL_RANK is 0, but must be below LOCAL_WORLD_SIZE, 0"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
    ],
)
def test_what_launchers_left_out_or_got_wrong(environment, line):
    with pytest.raises(UsageError) as error:
        check_launcher(environment)
    assert line in str(error.value)


def test_a_task_of_slurm_without_its_place():
    check_slurm(SRUN)
    with pytest.raises(UsageError, match="SLURM_NTASKS is set, but not SLURM_LOCALID: start the command with srun"):
        check_slurm({**SRUN, "SLURM_LOCALID": ""})


def find_commands(group, *words):
    for word, entry in group.items():
        if isinstance(entry, Group):
            yield from find_commands(entry.commands, *words, word)
        else:
            yield [*words, word], entry


def test_commands_that_a_launcher_starts_check_its_variables(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "foo")
    parallel = {" ".join(words) for words, command in find_commands(COMMANDS) if command.has_processes}
    assert parallel == {"train", "evaluate", "detect train", "detect evaluate"}
    for words in parallel:
        assert "RANK must be a whole number, got 'foo'" in refuse(capsys, *words.split())
