"""Runs commands in forks of a warm process, see `zygote.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    signal: int | None
    hangs: bool
    left: bool  # whether it left processes behind
    seconds: float
    stdout: str
    stderr: str
    files: dict[str, str] = field(default_factory=dict)  # the metrics and options of a run that it wrote


class Worker:
    """A warm process. `run` runs one command in a fork of it."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        ours, theirs = os.pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "0"}
        environment["DGNET_AGGREGATE"] = "plain"  # each box is a home of its own, where the kernels would be built again
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.zygote", str(theirs)],
            stdin=subprocess.PIPE,
            pass_fds=[theirs],
            cwd=ROOT,
            env=environment,
        )
        os.close(theirs)
        self.answers = os.fdopen(ours, "rb")
        self.imports: list[str] = []

    def run(self, words: list[str], box: Path, limit: float = 10, warms: bool = False, **more: Any) -> Outcome:
        """Run `dgnet` with `words` in the folder `box`. If `warms`, later runs have the modules that this one imported."""
        answer = os.path.join(self.folder.name, "answer")
        request: dict[str, Any] = {"words": words, "box": str(box), "answer": answer, "limit": limit, "modules": warms, **more}
        request["import"], self.imports = self.imports, []
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        found = json.loads(self.answers.readline())
        texts = {
            name: Path(f"{answer}.{name}").read_bytes().decode("utf-8", "backslashreplace") for name in ("stdout", "stderr")
        }
        if warms and (modules := Path(answer + ".modules")).exists():
            self.imports = json.loads(modules.read_text())
        return Outcome(**{**found, "status": 0 if found["status"] is None else found["status"]}, **texts)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()
        self.folder.cleanup()
