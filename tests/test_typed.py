from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgnet.bench import BenchConfig
from dgnet.detection import DetectConfig
from dgnet.errors import UsageError
from dgnet.options import flag
from dgnet.training import TrainConfig
from dgnet.typed import Location, describe, hints_of, read_fields, read_plain, read_value, read_word

HUGE = 10**400


@pytest.mark.parametrize(
    ("hint", "word", "value"),
    [
        (int, "5", 5),
        (int, "-5", -5),
        (float, "5", 5.0),
        (float, "5e-4", 5e-4),
        (bool, "true", True),
        (str, "5", "5"),
        (str, "null", "null"),
        (str | None, "null", None),
        (int | None, "null", None),
        (list[int], "[1, 2]", [1, 2]),
        (dict[str, Any], "{a: [1, {b: null}]}", {"a": [1, {"b": None}]}),
        (Location, "x/~y", "x/~y"),
    ],
)
def test_words(hint, word, value):
    read = read_word(hint, word, "--x")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("hint", "word", "expected"),
    [
        (int, "5.0", "--x must be a whole number, got 5.0"),
        (int, "0x10", "--x must be a whole number, got '0x10'"),
        (int, "010", "got '010'"),
        (int, "1_0", "got '1_0'"),
        (int, "true", "got true"),
        (int, "null", "got null"),
        (int, "", "got ''"),
        (int, "9" * 400, "is out of range"),
        (float, "9" * 400, "is out of range"),
        (float, "1e999", "--x must be a finite number, got inf"),
        (float, "nan", "--x must be a number, got 'nan'"),
        (float, ".nan", "--x must be a finite number, got nan"),
        (float | None, "a", "--x must be a number or null, got 'a'"),
        (bool, "1", "--x must be true or false, got 1"),
        (bool, "maybe", "--x must be true or false, got 'maybe'"),
        (str, "", "--x must not be empty"),
        (str, " ", "--x must not be empty"),
        (str, "a\0b", "--x must not hold a NUL character"),
        (Location, "~nobody-has-this-name/x", "there is no such home folder"),
        (list[int], "[1, a]", "--x[1] must be a whole number, got 'a'"),
        (list[int], "5", "--x must be a list of whole numbers, got 5"),
        (dict[str, Any], "{1: 2}", "--x: names must be text, got 1"),
        (dict[str, Any], "{a: {b: .nan}}", "--x a b must be a finite number, got nan"),
        (dict[str, Any], "{a: 1, a: 2}", "'a' is given twice"),
    ],
)
def test_words_that_are_refused(hint, word, expected):
    with pytest.raises(UsageError) as caught:
        read_word(hint, word, "--x")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, np.int64(5), 5),
        (float, np.float32(0.5), 0.5),
        (bool, np.True_, True),
        (list[int], np.arange(2), None),
        (list[int], list(np.arange(2)), [0, 1]),
        (dict[str, Any], {"a": np.int8(3)}, {"a": 3}),
        (Location, Path("a/b"), "a/b"),
        (Location | None, Path("a"), "a"),
        (str, Path("a"), None),
    ],
)
def test_values_of_python_code(hint, value, expected):
    if expected is None:
        with pytest.raises(UsageError, match="x must be"):
            read_value(hint, value, "x")
    else:
        read = read_value(hint, value, "x")
        assert read == expected
        assert type(read) is type(expected)


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ant")
    assert read_word(Location, "~/data", "--x") == "/home/ant/data"
    assert read_word(str, "~/data", "--x") == "~/data"


def test_a_whole_number_is_read_as_text_and_a_fraction_is_not():
    assert read_value(str, 2, "devices") == "2"
    for value in (2.5, True, None, ["2"]):
        with pytest.raises(UsageError, match="devices must be text"):
            read_value(str, value, "devices")


def test_plain_values():
    assert read_plain({"a": (1, 2.0, None, True, "")}, "x") == {"a": [1, 2.0, None, True, ""]}
    for value, expected in ((object(), "got object"), ({"a": float("inf")}, "x a must be a finite"), ([HUGE], "out of range")):
        with pytest.raises(UsageError, match=expected):
            read_plain(value, "x")


@dataclass(frozen=True)
class Stored:
    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5,)


def test_fields():
    assert read_fields(Stored, {"size": [1, 2], "mean": [1, 2, 3]}, "f") == Stored((1, 2), (1.0, 2.0, 3.0))
    for values, expected in (
        ([], "f must be a mapping, got []"),
        (None, "f must be a mapping, got null"),
        ({}, "f lacks size"),
        ({"size": [1, 2], "sise": 3}, "f has the unknown entry 'sise'; did you mean 'size'?"),
        ({"size": [1]}, "f: size must be a list of 2 whole numbers, got [1]"),
        ({"size": [1, 2.5]}, "f: size[1] must be a whole number, got 2.5"),
        ({"size": [1, 2], "mean": 5}, "f: mean must be a list of numbers, got 5"),
    ):
        with pytest.raises(UsageError) as caught:
            read_fields(Stored, values, "f")
        assert expected in str(caught.value)


# Every option of every configuration refuses the same values, from Python code, recipes and words alike.
CONFIGS = (TrainConfig, DetectConfig, BenchConfig)
WRONG: dict[str, tuple[Any, ...]] = {
    "a whole number": (None, True, 1.5, 8.0, "0x10", "", float("nan"), HUGE, [1], {"a": 1}),
    "a number": (None, True, "5e", "", float("nan"), float("inf"), HUGE, [1]),
    "a list of numbers or a number": (None, True, "a", {"a": 1}, [object()], float("nan"), HUGE),
    "true or false": (None, 1, "maybe", 0.0, []),
    "text": (None, 1.5, True, "", " ", "a\0b", ["a"], {}),
    "a path": (None, 1.5, True, " ", "a\0b", ["a"], Path),
    "a dict": (None, 5, "a", [1], {1: 2}, {"a": {2: 3}}, {"a": object()}, {"a": float("nan")}),
}
OPTIONS = [(config, f.name) for config in CONFIGS for f in fields(config) if "help" in f.metadata]


@pytest.mark.parametrize(("config", "name"), OPTIONS, ids=[f"{config.__name__}-{name}" for config, name in OPTIONS])
def test_every_option_refuses_values_of_another_type(config, name):
    hint = hints_of(config)[name]
    kind = describe(hint).removesuffix(" or null")
    wrong = WRONG.get(kind, (None, 5, "a", {"a": 1}, [object()]))
    needed = {"data": "a", "images": "b", "val_data": "c"} if config is DetectConfig else {}
    needed |= {"model": "dg_resnet18"} if config is BenchConfig else {}
    for value in wrong:
        if value is None and describe(hint).endswith("or null"):
            continue
        with pytest.raises(UsageError, match="^" + flag(name)):
            config(**{**needed, name: value})
