"""Every command on every kind of terminal, pipe and disk: nothing that is done is lost, and nothing ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dgnet import _guard, _streams
from dgnet.cli import COMMANDS, main
from dgnet.cli.command import Command
from dgnet.errors import describe_failure_of_machine
from dgnet.training import Interrupted, TrainConfig, train
from dgnet.training._module import Classifier
from tests.helpers.boxes import box_entry, image_entry, write_set
from tests.helpers.command import QUICK, ask, refuse
from tests.helpers.data import jpeg
from tests.helpers.pairs import third
from tests.helpers.processes import hear_signals
from tests.helpers.terminals import KINDS, Kind, run_command

ODD = os.fsdecode(b"caf\xc3\xa9 \xe2\x82\xac \xff")  # letters outside ASCII and latin-1, and a byte that is no UTF-8
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")


def list_commands(commands: dict[str, Any]) -> list[str]:
    found = []
    for word, entry in commands.items():
        found += [word] if isinstance(entry, Command) else [f"{word} {rest}" for rest in list_commands(dict(entry.commands))]
    return found


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A folder with images, a run whose class has an odd name, COCO annotations and results with odd names."""
    folder = tmp_path_factory.mktemp("odd")
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("café €", 0), ("light", 200)):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                (folder / "data" / split / name / f"{index}.jpg").write_bytes(jpeg(colour + 5 * index))
    (folder / f"{ODD}.jpg").write_bytes(jpeg(100))
    data = str(folder / "data")
    assert main(["train", "--data", data, "--epochs", "1", "--output", str(folder / "run"), *QUICK]) == 0
    categories = [{"id": 1, "name": ODD}]
    write_set(folder, [image_entry(1)], [box_entry(1, 1, [4, 4, 20, 16], 1)], categories)
    result = {"image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 16], "score": 0.9}
    (folder / "results.json").write_text(json.dumps([result]))
    return folder


REAL = {
    "models": ["models"],
    "cost": ["cost", "dg_resnet20", "--image-size", "32", "32"],
    "convert": ["convert", "test_vit", "--image-size", "32"],
    "convert --json": ["convert", "test_vit", "--image-size", "32", "--json"],
    "evaluate": ["evaluate", "run"],
    "evaluate --json": ["evaluate", "run", "--json"],
    "evaluate --write": ["evaluate", "run", "--threshold-offset", "0.1", "--write", "OUTPUT/x.safetensors"],
    "predict": ["predict", "run", f"{ODD}.jpg"],
    "predict --json": ["predict", "run", f"{ODD}.jpg", "--json"],
    "train": ["train", "--data", "data", "--epochs", "1", "--output", "OUTPUT/run", *QUICK],
    "compare": [
        *("compare", "run", "--batch-sizes", "2", "--rounds", "1", "--compile", "false"),
        *("--output", "OUTPUT/compared"),
    ],
    "publish": ["publish", "run", "--to", "OUTPUT/made"],
    "analyze --json": ["analyze", "run", "--extremes", "1", "--explorer", "2", "--output", "OUTPUT", "--json"],
    "detect evaluate": ["detect", "evaluate", "results.json", "--data", "instances.json"],
    "detect evaluate --json": ["detect", "evaluate", "results.json", "--data", "instances.json", "--json"],
}
"""Commands that print an odd name or “×”, and write files, as the words that follow `dgnet`."""
ONLY_HELP = {
    "bench": "slow",
    "doctor": "may compile",
    "export": "slow",
    "explore": "serves",
    "detect train": "slow",
    "detect predict": "slow",
    "experiment run": "starts processes",
    "experiment report": "needs finished runs",
    "experiment similarity": "needs a run",
}
"""Commands of which the fast tests print the help text only, and why. Their output uses the same functions."""

LONG = ("evaluate", "train", "analyze --json", "detect evaluate")
FILES = {"evaluate --write": "x.safetensors", "train": "run/model.safetensors", "analyze --json": "analysis.json"}


def test_every_command_has_a_case():
    named = {name.partition(" --")[0] for name in REAL} | set(ONLY_HELP)
    assert named == set(list_commands(COMMANDS))


@needs_full
@third(command=list_commands(COMMANDS), kind=KINDS)
def test_help_on_any_terminal(command, kind, tmp_path):
    check([*command.split(), "--help"], KINDS[kind], tmp_path)


@needs_full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["cost", "predict --json"])
def test_output_on_any_terminal(command, kind, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(odd)
    done = check(REAL[command], KINDS[kind], tmp_path)
    if done.output and "--json" in command:
        assert "café €" in json.loads(done.output)[0]["classes"]


@needs_full
@pytest.mark.parametrize("command", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in REAL])
def test_what_is_printed_has_escapes_in_ascii(command, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(odd)
    done = check([word.replace("OUTPUT", str(tmp_path)) for word in REAL[command]], KINDS["ASCII"], tmp_path)
    done.output.decode("ascii")
    if "--json" in command:
        json.loads(done.output)
    if command in FILES:
        assert (tmp_path / FILES[command]).exists()
    for path in tmp_path.iterdir():
        if path.suffix in (".csv", ".svg", ".html", ".json"):
            path.read_bytes().decode()  # valid UTF-8


@needs_full
@pytest.mark.parametrize("command", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FILES])
def test_files_are_written_before_a_print_that_fails(command, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(odd)
    check([word.replace("OUTPUT", str(tmp_path)) for word in REAL[command]], KINDS["full stdout"], tmp_path)
    assert (tmp_path / FILES[command]).exists()


def check(words: list[str], kind: Kind, folder: Path) -> Any:
    """Run a command, and check its exit status and that it prints at most the line about its output on stderr."""
    done = run_command(words, kind, folder)
    assert done.status == kind.status, done
    assert b"Traceback" not in done.errors
    assert b"Exception ignored" not in done.errors
    if kind.status == 1 and kind.errors == "file":
        assert done.errors.splitlines()[-1].startswith(b"dgnet: the output cannot be written: ")
        assert done.errors.count(b"dgnet: ") == 1
    if kind.status == 141:
        assert b"dgnet: " not in done.errors
    if kind.status == 0 and kind.output == "file":
        assert done.output
    return done


def test_an_argument_that_is_no_utf8(capsys):
    assert "\\udcff" in refuse(capsys, "predict", ODD, "x.jpg")
    assert "\\udcff" in refuse(capsys, "train", f"--{ODD}")
    assert "the name is not UTF-8" in refuse(capsys, "train", "--output", ODD)
    assert "\\udcff" in refuse(capsys, ODD)


@needs_full
def test_figures_are_printed_even_if_a_file_cannot_be_written(odd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(odd)
    for name in (".threshold_sweep.csv.part", ".mean.png.part"):
        (tmp_path / name).symlink_to("/dev/full")
    for words, figure in (
        (["evaluate", "run", "--sweep-threshold", "--offsets", "[0]"], "top-1 %"),
        (["analyze", "run", "--extremes", "0", "--explorer", "0"], "top-1"),
    ):
        assert main([*words, "--output", str(tmp_path)]) == 2
        output, errors = capsys.readouterr()
        assert figure in output
        assert errors.splitlines()[-1].startswith(f"dgnet: {tmp_path} cannot be written: No space left on device")


class Gone(io.StringIO):
    """A pipe whose reader leaves after the first write."""

    def write(self, text: str) -> int:
        if self.tell():
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_run_whose_reader_leaves_saves_and_ends_as_after_sigterm(odd, tmp_path, monkeypatch, capsys):
    options = ["--data", str(odd / "data"), "--epochs", "3", "--output", str(tmp_path / "run"), *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        with pytest.raises(SystemExit) as caught:
            main(["train", *options])
    assert caught.value.code == 143
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "after 3 epochs" in ask(capsys, "train", "--resume", tmp_path / "run")


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_hangup_counts_as_sigterm_unless_it_is_ignored(is_ignored, odd, tmp_path, monkeypatch):
    options = {"data": str(odd / "data"), "epochs": 1, "image_size": 8, "batch_size": 4, "output": str(tmp_path / "run")}
    config = TrainConfig(**options, model_kwargs={"channels": [4, 4, 4]}, accelerator="cpu", evaluate_every=1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    monkeypatch.setattr(Classifier, "on_train_batch_start", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    try:
        if is_ignored:
            train(config)
        else:
            with pytest.raises(Interrupted, match=r"interrupted by SIGHUP after step 1$") as caught:
                train(config)
            assert caught.value.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


FAILURES = {
    "memory": (MemoryError(), 1, "not enough memory; lower --batch-size, or the size of the images; no checkpoint"),
    "torch's memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "not enough"),
    "files": (OSError(24, "Too many open files", "x.jpg"), 1, "Too many open files: x.jpg; raise the limit with `ulimit -n`"),
    "norm": (ValueError("Expected more than 1 value per channel when training, got [1, 4]"), 2, "use a larger --batch-size"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_folder(name, odd, tmp_path, monkeypatch, capsys):
    error, status, line = FAILURES[name]

    def fail(*arguments: object) -> None:
        raise error

    words = ["train", "--data", str(odd / "data"), "--epochs", "1", "--output", str(tmp_path / "run"), *QUICK]
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", fail)
        try:
            assert main(words) == status
        finally:
            signal.signal(signal.SIGINT, handler)
    errors = capsys.readouterr().err
    assert line in errors.splitlines()[-1]
    assert errors.count("dgnet: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_bug_leaves_the_folder_free(odd, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise LookupError("a bug")

    words = ["train", "--data", str(odd / "data"), "--epochs", "1", "--output", str(tmp_path / "run"), *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", fail)
        with pytest.raises(LookupError):
            main(words)
    assert main(words) == 0


def test_after_a_checkpoint_an_error_says_how_to_continue(odd, tmp_path, monkeypatch, capsys):
    step = Classifier.training_step

    def fail_in_the_second_epoch(module: Classifier, *arguments: Any) -> Any:
        if module.current_epoch == 1:
            raise MemoryError
        return step(module, *arguments)

    run = tmp_path / "run"
    monkeypatch.setattr(Classifier, "training_step", fail_in_the_second_epoch)
    assert main(["train", "--data", str(odd / "data"), "--epochs", "2", "--output", str(run), *QUICK]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(
        f"the checkpoint {run}/checkpoints/last.ckpt of step 3 is whole; then continue with --resume:"
        f" dgnet train --resume {run}"
    )
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0


def test_one_image_in_a_forward_pass_is_refused_before_anything_is_written(odd, tmp_path, capsys):
    words = ["--model", "dg_resnet18", "--batch-size", 4, "--accumulate", 4, "--image-size", 32, "--output", tmp_path / "run"]
    line = refuse(capsys, "train", "--data", odd / "data", *words)
    assert "dg_resnet18 cannot be trained with 1 image in a forward pass" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["jsonargparse", "torch.types"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_one_line(module, signum, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "dgnet", "cost", "dg_resnet20"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    assert process.stderr is not None
    lines = []
    with process.stderr as printed:
        for line in printed:  # a line for each module that has been imported
            if not line.startswith("import time:"):
                lines.append(line)
            elif line.rpartition("|")[2].strip() == module:
                process.send_signal(signum)
    assert process.wait(300) == 128 + signum
    assert lines == [f"dgnet: {'interrupted' if signum == signal.SIGINT else 'terminated'}\n"]


def test_a_signal_that_a_callback_swallows_is_sent_again(monkeypatch):
    signals = _guard._Signals()
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP")}

    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def swallow_and_wait() -> None:
        Swallows()
        threading.Event().wait(10)

    try:
        signals.install()
        monkeypatch.setattr(_guard, "_is_loading", lambda frame: False)
        with pytest.raises(_guard.Ended):
            swallow_and_wait()
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def test_streams_that_are_missing_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["models"]) == 1
    assert main(["train", "--foo"]) == 2
    assert sys.stdout is None
    _streams.say("nobody reads this")


def test_commands_in_two_threads_leave_the_streams_as_they_were(capsys):
    before = sys.stdout, sys.stderr
    first, second = _streams.safe_streams(), _streams.safe_streams()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert (sys.stdout, sys.stderr) == before


def test_a_library_that_finds_no_memory_is_one_line():
    error = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    assert describe_failure_of_machine(error).startswith("a library cannot be loaded: not enough memory")
    assert describe_failure_of_machine(ImportError("no module named foo")) is None
