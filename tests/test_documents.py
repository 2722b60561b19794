from __future__ import annotations

import os

import pytest
import yaml

from dgnet.documents import DEPTH, parse_json, parse_yaml, read_json, read_yaml
from dgnet.errors import UsageError

BOMB = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("lr: 5e-4", {"lr": 5e-4}),
        ("[1, -2, +3, 0]", [1, -2, 3, 0]),
        ("[1.5, .5, 1., 1e3, -2E-1]", [1.5, 0.5, 1.0, 1000.0, -0.2]),
        ("[true, False, yes, off, null, ~]", [True, False, True, False, None, None]),
        ("[0x10, 010, 1_0, 0b1, 1:30, 2021-01-01, ０]", ["0x10", "010", "1_0", "0b1", "1:30", "2021-01-01", "０"]),
        ("['1', \"true\"]", ["1", "true"]),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ],
)
def test_yaml(text, value):
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1\nlr: 2", "x: line 2: 'lr' is given twice"),
        ("a: {b: 1, b: 1}", "'b' is given twice"),
        ("[" * 3000, "nested too deep"),
        ("{a: " * 3000, "nested too deep"),
        ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "nested too deep"),
        (BOMB, "expand to more than"),
        ("&a [*a]", "refers to itself"),
        ("a: &a {b: *a}", "refers to itself"),
        ("a: !!python/object:os.system x", "the tag"),
        ("a: !!binary aGk=", "the tag"),
        ("[1] : 2", "a key must be a word"),
        ("a: " + "9" * 30, "is out of range"),
        ("a: " + "9" * 5000, "is out of range"),
        ("a: [", "is not valid YAML"),
        ("a: \x01", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("<<: 5", "takes a mapping"),
    ],
)
def test_yaml_that_is_refused(text, expected):
    check_refusal(parse_yaml, text, expected)


def check_refusal(parse, text, expected):
    with pytest.raises(UsageError, match=r"^x\b") as caught:
        parse(text, "x")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300


def test_yaml_that_pyyaml_writes_is_read_back():
    values = {"a": [1, 2.5, 1e-8, True, None, "x", "1", "null", "0x10", "010", "é", "\udce9", ""], "b": {"c": {}}, "d": []}
    assert parse_yaml(yaml.safe_dump(values, allow_unicode=True), "x") == values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('[{"b": {"a": 1, "a": 2}}]', "'a' is given twice"),
        ("[" * 100_000, "nested too deep"),
        ("[" + "9" * 20 + "]", "is out of range"),
        ("[" + "9" * 5000 + "]", "is out of range"),
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_json_that_is_refused(text, expected):
    check_refusal(parse_json, text, expected)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_files_that_cannot_be_read(read, tmp_path):
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    for path, expected in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no", "No such file"),
        (tmp_path / ("n" * 300), "too long"),
        (tmp_path / "latin", "it is not UTF-8 text"),
    ):
        with pytest.raises(UsageError, match=expected):
            read(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is no regular file"):
        read(tmp_path / "pipe")
    (tmp_path / "bom").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read(tmp_path / "bom") == {"a": 1}
