"""Which subfolder trains and which one evaluates: usual names, never the test split by itself."""

from __future__ import annotations

import json

import pytest

from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.data import EVALUATION, TRAIN, open_dataset, open_train_and_evaluation
from dgnet.errors import UsageError
from dgnet.evaluation import open_evaluation_data
from tests.helpers.command import QUICK, refuse
from tests.helpers.data import write_folder


def divide(root, *names: str) -> str:
    for count, name in enumerate(names, start=4):
        write_folder(root / name, {"cat": count, "dog": 1})
    return str(root)


@pytest.mark.parametrize("train", ["train", "training", "Train"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "eval", "Val"])
def test_usual_names_are_known(tmp_path, train, val):
    data = open_train_and_evaluation(divide(tmp_path, train, val, "test"), None)
    assert [part.ledger.source for part in data] == [f"{tmp_path}/{train}", f"{tmp_path}/{val}"]


@pytest.mark.parametrize("names", [("val", "valid"), ("val", "Val"), ("dev", "validation", "test")])
def test_two_validation_folders_are_not_chosen_from(tmp_path, names):
    with pytest.raises(UsageError, match=r"holds both \w+/ and \w+/; name the one to use, as in --val-data"):
        open_train_and_evaluation(divide(tmp_path, "train", *names), None)


def test_the_test_folder_is_used_on_request_only(tmp_path):
    source = divide(tmp_path, "train", "test")
    with pytest.raises(UsageError, match=r"used on request only: give --val-data .*/test, or .* with --holdout N"):
        open_train_and_evaluation(source, None)
    assert len(open_train_and_evaluation(source, f"{source}/test")[1]) == 6
    assert len(open_train_and_evaluation(source, None, holdout=2)[1]) == 2
    with pytest.raises(UsageError, match="used on request only"):
        open_dataset(source, EVALUATION)


def test_splits_without_training(tmp_path):
    source = divide(tmp_path, "val", "test")
    assert open_dataset(source, EVALUATION).ledger.source == f"{source}/val"
    with pytest.raises(UsageError, match=r"holds val/, test/ but no training folder \(train/, training/\)"):
        open_dataset(source, TRAIN)


def test_a_hidden_folder_makes_no_split(tmp_path):
    write_folder(tmp_path, {"train": 2, "bus": 2})
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert open_dataset(str(tmp_path), TRAIN).class_names == ["bus", "train"]


def test_splits_without_class_folders_are_no_classes(tmp_path):
    write_folder(tmp_path, {"train": 2, "test": 2})
    with pytest.raises(UsageError, match="holds the splits test, train, which hold no class folders"):
        open_dataset(str(tmp_path), TRAIN)


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train_images", "test_images")])
def test_folders_called_almost_like_splits_are_no_classes(tmp_path, names):
    source = divide(tmp_path, *names)
    with pytest.raises(UsageError, match=r"which look like splits, not like classes; name .* --data .*/train\w+, or call"):
        open_train_and_evaluation(source, None, holdout=2)
    assert len(open_train_and_evaluation(f"{source}/{names[0]}", f"{source}/{names[1]}")[0]) == 5


@pytest.mark.parametrize("names", [("train_station", "bus_stop"), ("test_tube", "test_strip"), ("trainer", "tester")])
def test_classes_may_begin_like_splits(tmp_path, names):
    write_folder(tmp_path, dict.fromkeys(names, 2))
    assert open_dataset(str(tmp_path), TRAIN).class_names == sorted(names)


def test_the_same_images_for_training_and_evaluation_are_said(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", {"cat": 2, "dog": 2})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("data")
    for source in ("data", "./data/", str(tmp_path / "data"), "link"):
        (warning,) = open_train_and_evaluation("data", source)[1].ledger.warnings
        assert warning.endswith("training and evaluation use the same images")


def test_a_run_that_was_evaluated_on_test_goes_on_with_it(tmp_path, capsys):
    source = divide(tmp_path / "data", "train", "val")
    run = tmp_path / "run"
    assert main(["train", *QUICK, "--epochs", "1", "--data", source, "--output", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"training data: {source}/train: 5 images of 2 classes\n" in said
    assert f"evaluation data: {source}/val: 6 images of 2 classes\n" in said
    assert json.loads((run / "data.json").read_text())["evaluation"]["source"] == f"{source}/val"

    (tmp_path / "data" / "val").rename(tmp_path / "data" / "test")
    assert "used on request only" in refuse(capsys, "evaluate", run)
    (run / "data.json").unlink()  # as a version wrote the run that took test/
    assert main(["evaluate", str(run)]) == 0
    assert f"evaluation data: {source}/test: 6 images of 2 classes\n" in capsys.readouterr().err
    write_folder(tmp_path / "data" / "valid", {"cat": 1})  # a name that version did not know
    checkpoint = load_checkpoint(run)
    assert open_evaluation_data(checkpoint).ledger.source == f"{source}/test"
    assert open_evaluation_data(checkpoint, source).ledger.source == f"{source}/valid"
