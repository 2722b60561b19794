"""A run remembers where its data are: it is evaluated and continued from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.data import absolute_source
from tests.helpers.command import ask, refuse


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("folder", "{here}/folder"),
        ("../folder", "{above}/folder"),
        ("/data/x", "/data/x"),
        ("x-{0..4}.tar", "{here}/x-{{0..4}}.tar"),
        ("wds/x-{0..4}.tar", "wds/{here}/x-{{0..4}}.tar"),
        ("a.tar::b.tar", "{here}/a.tar::{here}/b.tar"),
        ("$DATA/x.tar", "$DATA/x.tar"),
        ("digits", "digits"),
        ("torch/cifar10", "torch/cifar10"),
        ("hfds/user/name:val", "hfds/user/name:val"),
        ("https://host/x.tar", "https://host/x.tar"),
        ("pipe:cat x.tar", "pipe:cat x.tar"),
    ],
)
def test_sources_as_they_are_stored(source, expected, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "folder").mkdir()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert absolute_source(source) == expected.format(here=tmp_path / "here", above=tmp_path)


def test_a_run_is_evaluated_and_continued_from_another_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    words = ["--epochs", "1", "--warmup-epochs", "0", "--image-size", "8", "--batch-size", "8"]
    run = tmp_path / "run"
    assert main(["train", "--data", ".", "--output", str(run), *words]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"] == load_checkpoint(run).config["data"] == str(data)
    here = ask(capsys, "evaluate", run, "--json")
    elsewhere = tmp_path / "elsewhere"
    for split in ("train", "val"):  # another data set under the same relative name
        (elsewhere / split / "dark").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert ask(capsys, "evaluate", run, "--json") == here
    (run / "model.safetensors").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "model.safetensors").is_file()


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", LONG],
        ["evaluate", "RUN", "--data", LONG],
        ["analyze", LONG],
        ["analyze", "RUN", "--data", LONG],
        ["analyze", "--curves", LONG, "--output", "out"],
        ["analyze", "RUN", "--output", LONG],
        ["predict", LONG, "x.jpg"],
        ["predict", "RUN", LONG],
        ["export", LONG],
        ["export", "RUN", "--output", f"{LONG}.onnx"],
        ["explore", LONG],
        ["train", "--data", LONG],
        ["train", "--val-data", LONG, "--data", "DATA"],
        ["train", "--weights", LONG],
        ["train", "--config", LONG],
        ["train", "--resume", LONG],
        ["train", "--output", LONG],
        ["detect", "train", "--data", LONG, "--images", LONG, "--val-data", LONG],
        ["detect", "evaluate", LONG],
        ["detect", "evaluate", f"{LONG}.json", "--data", LONG],
        ["detect", "predict", LONG, "x.jpg"],
    ],
    ids=lambda words: " ".join(word[:9] for word in words),
)
def test_a_path_that_is_too_long_ends_in_one_line(words, trained, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refuse(capsys, *[{"RUN": str(trained), "DATA": str(data)}.get(word, word) for word in words])
    assert "File name too long" in line or "does not exist" in line
    assert list(Path().iterdir()) == []


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trained"
    small = ["--epochs", "1", "--warmup-epochs", "0", "--image-size", "8", "--batch-size", "8"]
    assert main(["train", "--data", str(data), "--output", str(run), *small]) == 0
    return run
