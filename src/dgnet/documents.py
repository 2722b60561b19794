"""JSON and YAML documents, read strictly: a file that people edit means one thing, or it is refused.

Refused in one line are: a key given twice, nesting deeper than `DEPTH`, references that expand to more than `VALUES` values or
to themselves, whole numbers beyond 64 bits, YAML's tags, and text that is not UTF-8. Not-finite numbers are left to the reader
of the values (`dgnet.typed`), because only some values must be finite.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dgnet.errors import UsageError, reason, shorten
from dgnet.paths import read_text

DEPTH = 100
VALUES = 100_000
"""How many values a YAML document may hold, counted after its references are replaced by what they refer to."""

_LARGEST = 2**63


def read_json(path: str | Path, what: str = "") -> Any:
    """The content of a JSON file. `what`: how messages call it, before its path. Raises UsageError as `parse_json` does."""
    return parse_json(read_text(path, what), f"{what} {path}".strip())


def read_yaml(path: str | Path, what: str = "") -> Any:
    """The content of a YAML file. `what`: how messages call it, before its path. Raises UsageError as `parse_yaml` does."""
    return parse_yaml(read_text(path, what), f"{what} {path}".strip())


def parse_json(text: str, where: str) -> Any:
    """The plain value of a JSON text. `where`: what the message begins with if it raises UsageError."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_read_int)
    except _Refused as error:
        raise UsageError(f"{where}: {error}") from None
    except RecursionError:
        raise UsageError(f"{where} is nested too deep") from None
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON ({reason(error)})") from None


def parse_yaml(text: str, where: str) -> Any:
    """The plain value of a YAML text. `where`: what the message begins with if it raises UsageError.

    Only decimal digits make a number (5e-4 is one, too). 0x10, 010 and 1_0 are text, which an option for numbers refuses.
    """
    import yaml  # not at the top: 20 ms that most commands do not need

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return _Builder(yaml).build(node, 0)
    except _Refused as error:
        raise UsageError(f"{where}: {error}") from None
    except RecursionError:
        raise UsageError(f"{where} is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{where} is not valid YAML ({_describe(error)})") from None


class _Refused(Exception):  # noqa: N818, it becomes a UsageError
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice; remove one")
    return values


def _read_int(digits: str) -> int:
    if len(digits) > 20 or not -_LARGEST <= (value := int(digits)) < _LARGEST:
        raise _Refused(f"the number {shorten(digits, 25)} is out of range, allowed are 64 bits")
    return value


_NULL = ("", "~", "null", "Null", "NULL")
_TRUTH = {
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)
_PREFIX = "tag:yaml.org,2002:"


def read_scalar(text: str) -> Any:
    """The value of a word without quotes, in YAML and on the command line."""
    if text in _NULL:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if _WHOLE.fullmatch(text):
        return _read_int(text)
    if _NUMBER.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Builder:
    """Builds plain values from PyYAML's nodes. Raises _Refused with the line of what is refused."""

    def __init__(self, yaml: Any) -> None:
        self.yaml = yaml
        self.values = 0

    def build(self, node: Any, depth: int) -> Any:
        if node is None:  # an empty document
            return None
        self.values += 1
        if depth > DEPTH:
            raise _Refused(f"line {_line(node)}: nested too deep, or it refers to itself")
        if self.values > VALUES:
            raise _Refused(f"line {_line(node)}: its references expand to more than {VALUES:,} values")
        if isinstance(node, self.yaml.SequenceNode):
            self._check_tag(node, "seq")
            return [self.build(item, depth + 1) for item in node.value]
        if isinstance(node, self.yaml.MappingNode):
            self._check_tag(node, "map")
            return self._build_mapping(node, depth)
        if node.style is not None:
            self._check_tag(node, "str")
            return node.value
        self._check_tag(node, "str", "null", "bool", "int", "float", "timestamp", "merge", "value")
        return read_scalar(node.value)

    def _build_mapping(self, node: Any, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_PREFIX}merge":
                sources = value_node.value if isinstance(value_node, self.yaml.SequenceNode) else [value_node]
                for source in (self.build(item, depth + 1) for item in sources):
                    if not isinstance(source, dict):
                        raise _Refused(f"line {_line(value_node)}: << takes a mapping")
                    merged = {**source, **merged}
                continue
            key = self.build(key_node, depth + 1)
            if isinstance(key, list | dict):
                raise _Refused(f"line {_line(key_node)}: a key must be a word")
            if key in values:
                raise _Refused(f"line {_line(key_node)}: {key!r} is given twice; remove one")
            values[key] = self.build(value_node, depth + 1)
        return {**merged, **values}

    def _check_tag(self, node: Any, *allowed: str) -> None:
        if node.tag.removeprefix(_PREFIX) not in allowed:
            raise _Refused(f"line {_line(node)}: the tag {shorten(node.tag)} is not allowed; write plain values")


def _describe(error: Exception) -> str:
    """What PyYAML found, in one line, without the excerpt that it draws under it."""
    if hasattr(error, "character"):
        character = error.character if isinstance(error.character, int) else ord(error.character[:1] or "?")
        return f"the character {character:#04x} is not allowed"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark is not None and problem else reason(error)


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
