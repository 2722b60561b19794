"""Values of known types: what options, recipes, run folders and checkpoints hold, read by one reader with one set of messages.

A type is written as an annotation: bool, int, float, str, `Location`, `list[…]`, `tuple[…]`, `dict[str, Any]`, and each of them
`| None`; also `list[…] | float`.
"""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache, partial
from typing import Annotated, Any, TypeVar, Union

from dgnet.documents import parse_yaml
from dgnet.errors import UsageError, did_you_mean, shorten
from dgnet.paths import expand

T = TypeVar("T")

LOCATION = "a path"
Location = Annotated[str, LOCATION]
"""A path, or a data source, which may be one: `~` is expanded."""

MAY_BE_EMPTY = "may be empty"
Label = Annotated[str, MAY_BE_EMPTY]
"""The name of a class, which is text and may be empty."""

_LARGEST = 2**63


def read_value(hint: Any, value: Any, what: str) -> Any:
    """`value` as the type `hint`. Raises UsageError, which begins with `what`, for a value of another type.

    Numbers must be finite and whole ones must have at most 64 bits; text must not be empty. If text is asked for, a whole
    number is read as text, so that `devices: 2` needs no quotes. From Python code also a number of NumPy is taken, and an
    object of `os.PathLike` for a path.
    """
    value = _without_numpy(value)
    kind, *others = _alternatives(hint)
    if value is None and type(None) in others:
        return None
    if others[:1] == [float] and isinstance(value, int | float):
        kind = float
    return _READERS[_origin(kind)](kind, value, _Refusal(hint, value, what))


def read_word(hint: Any, word: str, what: str) -> Any:
    """A word of the command line as the type `hint`. Raises UsageError as `read_value` does.

    Text is taken as it is, but `null` is None where that is allowed. Everything else is written as in YAML.
    """
    kind, *others = _alternatives(hint)
    if _origin(kind) is str:
        return None if word == "null" and others else read_value(hint, word, what)
    try:
        value = parse_yaml(word, what) if word.strip() else word
    except UsageError:
        if _origin(kind) in (list, dict) or word.strip().lstrip("+-").isdigit():
            raise
        value = word
    return read_value(hint, value, what)


_hints_of = cache(partial(typing.get_type_hints, include_extras=True))  # takes milliseconds for a configuration


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Field of the dataclass `kind` -> its type."""
    return _hints_of(kind)  # type: ignore[arg-type]  # mypy takes no class for hashable


def read_fields(kind: type[T], values: Any, where: str, spell: Callable[[str], str] = str) -> T:
    """An instance of the dataclass `kind` from the mapping `values`, as a file stores it. Fields with a default may be missing.

    `where`: what the message begins with if it raises UsageError: for a value that is no mapping, for an unknown or missing
    field, for a value of another type, and for what `kind` itself refuses. `spell`: how messages write the name of a field.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where} must be a mapping, got {_show(values)}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise UsageError(f"{where} has the unknown entry {name!r}{did_you_mean(str(name), known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{where} lacks {spell(name)}")
    hints = hints_of(kind)
    read = {name: read_value(hints[name], value, f"{where}: {spell(name)}") for name, value in values.items()}
    try:
        return kind(**read)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def read_entry(values: Any, name: str, hint: Any, where: str) -> Any:
    """The entry `name` of the mapping `values`. Raises UsageError, which begins with `where`, as `read_fields` does."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{where} must be a mapping, got {_show(values)}")
    if name not in values:
        raise UsageError(f"{where} lacks {name}")
    return read_value(hint, values[name], f"{where}: {name}")


def describe(hint: Any) -> str:
    """The type in words, such as "a whole number or null"."""
    return " or ".join(_describe_one(kind) for kind in _alternatives(hint))


class _Refusal:
    """Makes the error for a value that is not of its type."""

    def __init__(self, hint: Any, value: Any, what: str) -> None:
        self.hint, self.value, self.what = hint, value, what

    def __call__(self, allowed: str = "") -> UsageError:
        return UsageError(f"{self.what} must be {allowed or describe(self.hint)}, got {_show(self.value)}")


def _without_numpy(value: Any) -> Any:
    """The number or truth value that a scalar of NumPy holds; any other value as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def _show(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else shorten(repr(value), 60)
    )


def _read_bool(kind: Any, value: Any, refusal: _Refusal) -> bool:
    if not isinstance(value, bool):
        raise refusal()
    return value


def _read_int(kind: Any, value: Any, refusal: _Refusal) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal()
    if not -_LARGEST <= value < _LARGEST:
        raise UsageError(f"{refusal.what} is out of range, allowed are 64 bits, got {shorten(hex(value), 25)}")
    return value


def _read_float(kind: Any, value: Any, refusal: _Refusal) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal()
    if isinstance(value, int):
        _read_int(int, value, refusal)
    if not math.isfinite(value):
        raise refusal("a finite number")
    return float(value)


def _read_str(kind: Any, value: Any, refusal: _Refusal) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(_read_int(int, value, refusal))
    is_location = _is_marked(kind, LOCATION)
    if is_location and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise refusal()
    if not value.strip() and not _is_marked(kind, MAY_BE_EMPTY):
        raise UsageError(f"{refusal.what} must not be empty")
    if "\0" in value:
        raise UsageError(f"{refusal.what} must not hold a NUL character")
    if is_location and value.startswith("~"):
        return str(expand(value))
    return value


def _read_list(kind: Any, value: Any, refusal: _Refusal) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise refusal()
    (item,) = typing.get_args(kind)
    return [read_value(item, entry, f"{refusal.what}[{number}]") for number, entry in enumerate(value)]


def _read_tuple(kind: Any, value: Any, refusal: _Refusal) -> tuple[Any, ...]:
    items = typing.get_args(kind)
    if items[-1] is Ellipsis:
        return tuple(_read_list(list[items[0]], value, refusal))  # type: ignore[valid-type]
    if not isinstance(value, list | tuple) or len(value) != len(items):
        raise refusal()
    return tuple(
        read_value(item, entry, f"{refusal.what}[{number}]")
        for number, (item, entry) in enumerate(zip(items, value, strict=True))
    )


def _read_dict(kind: Any, value: Any, refusal: _Refusal) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise refusal()
    for key in value:
        if not isinstance(key, str):
            raise UsageError(f"{refusal.what}: names must be text, got {_show(key)}")
    return {key: read_plain(entry, f"{refusal.what} {key}") for key, entry in value.items()}


def read_plain(value: Any, what: str) -> Any:
    """A plain value, which a checkpoint can hold: null, truth values, finite numbers, text, lists and dicts of them.

    Raises UsageError, which begins with `what`, for any other value.
    """
    value = _without_numpy(value)
    refusal = _Refusal(None, value, what)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return _read_int(int, value, refusal)
    if isinstance(value, float):
        return _read_float(float, value, refusal)
    if isinstance(value, list | tuple):
        return [read_plain(entry, f"{what}[{number}]") for number, entry in enumerate(value)]
    if isinstance(value, Mapping):
        return _read_dict(dict, value, refusal)
    raise UsageError(
        f"{what} must be a number, text, truth value, or a list or dict of these, got {type(value).__name__}:"
        " a checkpoint carries plain values only"
    )


_READERS: dict[Any, Callable[[Any, Any, _Refusal], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    list: _read_list,
    tuple: _read_tuple,
    dict: _read_dict,
}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of `A | None`, of which None is the last; of any other hint only the hint."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_marked(kind: Any, mark: str) -> bool:
    """Whether a hint is `Annotated` with `mark`."""
    return mark in getattr(kind, "__metadata__", ())


def is_location(hint: Any) -> bool:
    """Whether a hint is `Location`, or `Location | None`."""
    return _is_marked(_alternatives(hint)[0], LOCATION)


def _origin(kind: Any) -> Any:
    """The class that a hint is of: list for list[int], str for `Location`."""
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)[0]
    return typing.get_origin(kind) or kind


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a dict", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", dict: "dicts"}


def _describe_one(kind: Any) -> str:
    origin = _origin(kind)
    if origin not in (list, tuple):
        return LOCATION if _is_marked(kind, LOCATION) else _WORDS[origin]
    items = typing.get_args(kind)
    count = "" if origin is list or items[-1] is Ellipsis else f"{len(items)} "
    return f"a list of {count}{_PLURALS[_origin(items[0])]}"
