"""Whether a command answered an input as it should."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from dgnet.documents import parse_yaml
from dgnet.training._config import RESUME_OPTIONS
from tests.fuzz.edits import NEUTRAL
from tests.fuzz.worker import Outcome


@dataclass(frozen=True)
class Input:
    """A command line, and changes of the files that it uses; see `tests.fuzz.bases` for the names in `@…@`."""

    kind: str
    words: list[str]
    edits: list[list[Any]] = field(default_factory=list)
    run: str = "finished"  # the run that is copied: finished, or half
    what: str = ""  # one line about it
    status: int | None = None  # the status that it must have; None: any that fits the rules
    says: str = ""  # a text that the answer must hold

    @property
    def is_neutral(self) -> bool:
        """Whether all changes say the same as the files did."""
        return bool(self.edits) and all(change[0] in NEUTRAL for change in self.edits)


@dataclass(frozen=True)
class Fault:
    """`name`: what is wrong, the same for inputs with the same cause. `detail`: for this input."""

    name: str
    detail: str


PROGRESS = re.compile(
    r"^(\s*$|.*\d+%\|.*|.*\d+(it|step|batch|image|img|round)s?/s.*|epoch \d+/\d+: .*|iteration \d+/\d+: .*|trained at .*|"
    r".* parameters, on .* -> .*|exporting .*)"
)
"""Lines on stderr that say nothing about a fault."""

INTERNAL = re.compile(
    r"NoneType|has no attribute|unsupported operand|not subscriptable|not iterable|not callable|must be str, not|"
    r"unexpected keyword|positional argument|<class |<module|object at 0x|enforce fail|codec can't|invalid literal|"
    r"could not convert|<unicode string>|<byte string>|not supported between|unhashable|"
    r"TypeError|ValueError|KeyError|AttributeError|RuntimeError|IndexError"
)
"""Words of Python that a user need not know. `reason` may pass some on."""

LONGEST = 1_000
"""Characters of a line that can still be read."""


def judge(given: Input, found: Outcome, reference: Outcome | None) -> list[Fault]:
    """The faults of an answer. `reference`: the answer to the same command with unchanged files, if they are to be compared."""
    faults = []
    lines = [line for line in re.split(r"[\r\n]+", found.stderr) if not PROGRESS.match(line)]
    if found.hangs:
        faults.append(Fault(f"hangs in {_frame(found.stderr, newest_first=True)}", ""))
        return faults
    if found.signal:
        faults.append(
            Fault(f"ended by signal {found.signal} in {_frame(found.stderr, newest_first=True)}", found.stderr[-300:])
        )
        return faults
    if found.left:
        faults.append(Fault("leaves processes behind", ""))
    if "Traceback" in found.stderr + found.stdout:
        faults.append(
            Fault(f"traceback: {_frame(found.stderr)}: {_normal(lines[-1] if lines else '')}", lines[-1] if lines else "")
        )
        return faults
    own = [line for line in lines if line.startswith("dgnet: ")]
    if found.status not in (0, 2):
        faults.append(Fault(f"status {found.status}: {_normal(own[-1] if own else '')}", "\n".join(lines[-3:])))
    if found.status and len(own) != 1 and not _prints_help(given, found):
        faults.append(Fault(f"status {found.status} with {len(own)} lines", "\n".join(lines[-5:])))
    if found.status and own and lines[-1] != own[-1]:
        faults.append(Fault(f"lines after the message: {_normal(lines[-1])}", "\n".join(lines[-5:])))
    for line in own:
        if INTERNAL.search(line) and "cannot be built with" not in line:  # that line passes on what a constructor says
            faults.append(Fault(f"wording: {_normal(line)}", line))
        if len(line) > LONGEST + sum(map(len, given.words)):
            faults.append(Fault(f"long message: {_normal(line[:80])}", f"{len(line)} characters: {line[:200]}"))
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", found.stderr.replace("\x1b[A", "")):
        faults.append(Fault("control characters on stderr", repr(found.stderr[-300:])))
    if found.status == 0 and "--json" in given.words and not _is_json(found.stdout):
        faults.append(Fault("stdout is not one JSON document", found.stdout[:300]))
    if given.status not in (None, found.status):
        faults.append(
            Fault(f"status {found.status} instead of {given.status}: {given.what}", (found.stdout + "\n".join(lines))[-300:])
        )
    if given.says not in found.stdout + found.stderr:
        faults.append(Fault(f"does not say {given.says!r}: {given.what}", "\n".join(lines)[-300:]))
    if reference is not None:
        faults += _compare(given, found, reference, lines)
    return faults


def _compare(given: Input, found: Outcome, reference: Outcome, lines: list[str]) -> list[Fault]:
    if given.is_neutral:
        if (found.status, _figures(given, found)) != (reference.status, _figures(given, reference)):
            names = ", ".join(change[0] for change in given.edits)
            return [
                Fault(f"another result after a neutral change: {names}", f"{found.status} {lines[-1:]} {found.stdout[:200]}")
            ]
        return []
    if found.status or reference.status or [line for line in lines if line not in reference.stderr]:
        return []
    name, file, *rest = given.edits[-1]
    last = f"{name} {file} {rest[0] if rest and isinstance(rest[0], str | list) else ''}"
    if _figures(given, found) != _figures(given, reference):
        if any(may_change(given, change) for change in given.edits):
            return []
        return [Fault(f"silently another result: {last}", found.stdout[:300])]
    if "--resume" in given.words and (changed := _changed_options(found, reference)):
        return [Fault(f"an option without effect, kept in config.yaml: {changed[0]}", "")]
    return []


def _figures(given: Input, found: Outcome) -> str:
    """What a command measured."""
    names = [name for name in found.files if name.endswith("metrics.csv") and given.words[0] == "train"]
    return found.stdout + "".join(found.files[name].replace("\r", "") for name in sorted(names))


def _changed_options(found: Outcome, reference: Outcome) -> list[str]:
    """Options in config.yaml that decide the result, with another value."""
    texts = [one.files.get("run/config.yaml", "{}").removeprefix("\ufeff") for one in (found, reference)]
    own, other = (parse_yaml(text, "config.yaml") for text in texts)
    if not isinstance(own, dict):
        return []
    return [name for name in other if name not in RESUME_OPTIONS and own.get(name, other[name]) != other[name]]


def may_change(given: Input, change: list[Any]) -> bool:
    """The rules: which changes of a run's files may give other figures without a word.

    Weights are numbers that nothing can check, unless they are not finite. A description with another value of the same kind
    describes another network: other names of classes, other finite preprocessing. Bytes that are changed within a file without
    a checksum may be weights.
    """
    name, file, *values = change
    if file.endswith("metrics.csv"):  # a resumed run keeps its rows, `analyze --curves` draws them
        return given.words[0] in ("train", "analyze")
    if name in ("flip", "insert"):
        return file.endswith((".safetensors", ".ckpt"))
    if name in ("set_item", "set_description"):
        keys, text = values
        if "state_dict" in keys or not keys:
            return "nan" not in text and "inf" not in text
        return "class_names" in keys[:-1] or _is_plausible(keys, text)
    return False


def _is_plausible(keys: list[Any], text: str) -> bool:
    """Whether a value of a description might be what somebody trained with."""
    try:
        value = json.loads(text.replace("'", '"'))
    except ValueError:
        return False
    if keys == ["class_names"] or keys == ["dgnet", "class_names"]:
        return isinstance(value, list) and len(value) == len(set(map(str, value))) and all(isinstance(v, str) for v in value)
    if keys[-1] == "interpolation":
        return value in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
    numbers = value if isinstance(value, list) else [value]
    is_finite = all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) for number in numbers
    )
    lowest = {"std": 0, "crop_pct": 0, "image_size": 0}
    return bool(numbers) and is_finite and all(number > lowest.get(str(key), -math.inf) for number in numbers for key in keys)


def _prints_help(given: Input, found: Outcome) -> bool:
    return found.status == 2 and found.stderr.startswith("usage: ")


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return text.startswith("usage: ")
    return True


def _frame(stderr: str, newest_first: bool = False) -> str:
    """The innermost function of dgnet in a traceback."""
    frames = re.findall(r'File "[^"]*/src/dgnet/([^"]+)", line \d+,? in (\w+|<\w+>)', stderr)
    if not frames:
        return "?"
    return ":".join(frames[0] if newest_first else frames[-1])


def _normal(line: str) -> str:
    """A line without what differs between inputs."""
    line = re.sub(r"(/[^\s:,;'\"]+)+", "PATH", line)
    line = re.sub(r"'[^']*'|\"[^\"]*\"|‘[^’]*’", "'…'", line)
    line = re.sub(r"0x[0-9a-f]+|#x[0-9a-f]+", "N", line)
    return re.sub(r"-?\d[\d.,e+]*", "N", line)[:160]
