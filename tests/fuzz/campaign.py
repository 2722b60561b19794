"""Run many inputs, and keep those that are answered badly: `make fuzz`."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.bases import Bases, fill_in
from tests.fuzz.edits import apply
from tests.fuzz.inputs import KINDS
from tests.fuzz.judge import Fault, Input, judge
from tests.fuzz.worker import Outcome, Worker

FOUND = Path(__file__).parent / "found"
LIMIT = 10.0
"""Seconds for one input. One that takes longer is tried once more with three times as many, as the machine may be busy."""


class Fuzzer:
    """A warm process and the files that inputs start from."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.worker = Worker()
        (Path(self.folder.name) / "bases").mkdir()
        self.bases = Bases(self.worker, Path(self.folder.name) / "bases")
        self.references: dict[str, Outcome] = {}

    def close(self) -> None:
        """End the process and remove the files."""
        self.worker.close()
        self.folder.cleanup()

    def run(self, given: Input, limit: float = LIMIT) -> Outcome | None:
        """The answer to an input; None if none of its changes fits."""
        with tempfile.TemporaryDirectory(dir=self.folder.name, prefix="box-") as name:
            # All boxes have the same path, so that answers can be compared.
            box = Path(self.folder.name) / "box"
            os.rename(name, box)
            try:
                places = self.bases.fill(box, given.run)
                if given.edits and not [change for change in given.edits if apply(box, change)]:
                    return None
                found = self.worker.run([fill_in(word, places) for word in given.words], box, limit)
                return replace(found, files=_read_results(box))
            finally:
                os.rename(box, name)

    def find_faults(self, given: Input) -> list[Fault]:
        """The faults of the answer to an input."""
        found = self.run(given)
        if found is not None and found.hangs:
            found = self.run(given, 3 * LIMIT)
        if found is None:
            return []
        reference = None
        if given.is_neutral or (given.edits and given.kind in ("run", "checkpoint") and not found.status):
            reference = self._reference(given)
        return judge(given, found, reference)

    def _reference(self, given: Input) -> Outcome:
        plain = replace(given, edits=[])
        key = json.dumps([plain.words, plain.run])
        if key not in self.references:
            found = self.run(plain, 5 * LIMIT)
            assert found is not None
            self.references[key] = found
        return self.references[key]

    def reduce(self, given: Input, fault: Fault) -> Input:
        """A smaller input with the same fault: without the words and changes that it does not need."""
        is_smaller = True
        while is_smaller:
            is_smaller = False
            for smaller in _smaller(given):
                if any(other.name == fault.name for other in self.find_faults(smaller)):
                    given, is_smaller = smaller, True
                    break
        return given


def _read_results(box: Path) -> dict[str, str]:
    """The metrics and the options of the run in a box."""
    texts = {}
    for name in ("made", "run"):
        for file in ("metrics.csv", "config.yaml"):
            path = box / name / file
            if path.is_file():
                texts[f"{name}/{file}"] = path.read_bytes().decode("utf-8", "replace")
    return texts


def _smaller(given: Input) -> Iterator[Input]:
    for place in range(len(given.edits)) if len(given.edits) > 1 else ():
        yield replace(given, edits=given.edits[:place] + given.edits[place + 1 :])
    if given.kind == "command":
        for count in (2, 1):
            for place in range(len(given.words) - count, 0, -1):
                yield replace(given, words=given.words[:place] + given.words[place + count :])


def generate(kind: str, count: int, start: int) -> Iterator[Input]:
    """`count` different inputs of a kind; the same ones for the same `start`."""
    seen: set[str] = set()
    last: list[Input] = []

    @settings(max_examples=2, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(KINDS[kind])
    def draw(value: Input) -> None:
        last.append(value)

    number = 0
    while len(seen) < count:
        # One search for each input, as a long search repeats its parts. Its first input is the simplest there is.
        seed(f"{kind} {start} {number}")(draw)()
        number += 1
        if (text := json.dumps(asdict(last[-1]))) not in seen:
            seen.add(text)
            yield last[-1]


def read_kept() -> dict[str, list[Input]]:
    """The kept inputs of each file in found/, a JSON list with one input on each line."""
    return {path.stem: [Input(**row) for row in json.loads(path.read_text())] for path in sorted(FOUND.glob("*.json"))}


def write_kept(path: Path, inputs: list[Input]) -> None:
    """Write a file of kept inputs; fields with their default are left out."""
    plain = Input("", [])
    rows = [{k: v for k, v in asdict(row).items() if v != getattr(plain, k)} for row in inputs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def keep(folder: Path, given: Input, fault: Fault) -> Path:
    """Write an input to a new file in a folder."""
    path = next(path for n in range(10**6) if not (path := folder / f"{given.kind}-{n:03}.json").exists())
    write_kept(path, [replace(given, what=f"{fault.name}; {fault.detail}"[:300])])
    return path


def main() -> int:
    """Run inputs of all kinds, or those of a folder."""
    parser = argparse.ArgumentParser(description="Run random inputs through dgnet; keep those that it answers badly.")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--file", type=Path, help="instead of random inputs: those in a kept file")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--keep", type=Path, default=FOUND / "new", help="folder for inputs that are answered badly")
    args = parser.parse_args()
    start = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    if args.file is None:
        print(f"seed {start}; repeat with: --seed {start}", flush=True)
        values = (value for kind in args.kinds for value in generate(kind, args.inputs // len(args.kinds), start))
    else:
        values = (Input(**row) for row in json.loads(args.file.read_text()))
    fuzzer = Fuzzer()
    seen: Counter[str] = Counter()
    count = 0
    begin = time.monotonic()
    try:
        for value in values:
            count += 1
            for fault in fuzzer.find_faults(value):
                seen[fault.name] += 1
                if seen[fault.name] == 1:
                    where = args.file or keep(args.keep, fuzzer.reduce(value, fault), fault)
                    print(f"\n{fault.name}\n  {where}\n  {fault.detail[:300]}", flush=True)
            if sys.stderr.isatty() or count % 50 == 0:
                print(f"{count} inputs, {len(seen)} kinds of faults, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    finally:
        fuzzer.close()
    print(f"{count} inputs, {len(seen)} kinds of faults, seed {start}")
    for name, times in seen.most_common():
        print(f"{times:5} {name}")
    return int(bool(seen))


if __name__ == "__main__":
    sys.exit(main())
