"""Where a network is published to: what is refused, and what a folder keeps if something goes wrong."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from dgnet.errors import UsageError
from dgnet.files import lock
from dgnet.publishing import publish
from tests.helpers.command import ask, refuse
from tests.helpers.published import NETWORKS, save


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    save(path, "dg_resnet20", **NETWORKS["dg_resnet20"])
    return path


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("HF-HUB:user/name", "neither a folder nor hf-hub:USER/NAME"),
        ("Local-Dir:here", "neither a folder nor hf-hub:USER/NAME"),
        ("https://huggingface.co/user/name", "neither a folder nor hf-hub:USER/NAME"),
        ("file:///tmp/x", "neither a folder nor hf-hub:USER/NAME"),
        ("local-dir:", "names nothing"),
        ("hf_hub:user\\name", "no name of a model on the Hub"),
        ("hf-hub:user/name@v1", "no name of a model on the Hub"),
        ("hf-hub:user/name/", "no name of a model on the Hub"),
        ("two\nlines", "cannot be printed"),
        (None, "must be a path"),
        (["a"], "must be a path"),
    ],
)
def test_what_is_no_target_is_refused_and_makes_no_folder(to, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        publish(run, to)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_written_as_it_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert publish(run, "local-dir:here").source == "local-dir:here"
    assert (tmp_path / "here" / "config.json").is_file()


def test_private_is_for_the_hub(run, tmp_path, capsys):
    assert "--private is for a repository on the Hub" in refuse(capsys, "publish", run, "--to", tmp_path / "new", "--private")
    assert not (tmp_path / "new").exists()


def test_the_printed_command_can_be_pasted(run, tmp_path, capsys):
    assert f"predict 'local-dir:{tmp_path / 'a b'}' photo.jpg" in ask(capsys, "publish", run, "--to", tmp_path / "a b")


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ([], "no JSON object"),
        ({"top1": float("nan")}, "top1 must be a finite number"),
        ({"top1": -1}, "top1 must be 0 to 100"),
        ({"top1": True}, "top1 must be a number"),
        ({"top1": "91"}, "top1 must be a number"),
        ({"top1": 90.0, "images": 8.5}, "images must be a whole number"),
        ({"ap": 101}, "ap must be 0 to 100"),
        ({"top1": None}, "holds none of top1"),
    ],
)
def test_figures_that_no_evaluation_gives_are_refused(evaluation, message, run, tmp_path):
    with pytest.raises(UsageError, match=message):
        publish(run, tmp_path / "new", evaluation=evaluation)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("license", "message"), [("", "empty"), ("a\nb", "one line"), (["mit"], "must be text")])
def test_a_license_is_one_line_of_text(license, message, run, tmp_path):
    with pytest.raises(UsageError, match=message):
        publish(run, tmp_path / "new", license=license)


@pytest.mark.parametrize("fails", ["save_tensors", "write_card"])
def test_a_failed_publication_leaves_the_older_one_whole(fails, run, tmp_path, monkeypatch):
    publish(run, tmp_path / "published", evaluation={"top1": 50})
    before = {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"dgnet.publishing._publish.{fails}", fail)
    with pytest.raises(UsageError, match="No space left"):
        publish(run, tmp_path / "published", evaluation={"top1": 60})
    assert {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()} == before


def test_two_processes_do_not_publish_to_one_folder_at_once(run, tmp_path):
    publish(run, tmp_path / "published")
    with lock(tmp_path / "published", ""), pytest.raises(UsageError, match="another process publishes there"):
        publish(run, tmp_path / "published")


def test_what_a_killed_process_left_is_replaced(run, tmp_path):
    publish(run, tmp_path / "published")
    (tmp_path / "published" / ".config.json.part").write_text("{")
    publish(run, tmp_path / "published")
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("again", ["same", "folder", "source"])
def test_a_network_that_is_published_again_keeps_what_is_known_of_it(again, run, tmp_path):
    first = tmp_path / "first"
    publish(run, first, evaluation={"top1": 91.0, "images": 10}, license="mit")
    config = json.loads((first / "config.json").read_text())
    config["dgnet"]["command"] = "dgnet train --epochs 3"
    (first / "config.json").write_text(json.dumps(config))
    second = first if again == "same" else tmp_path / "second"
    publish(f"local-dir:{first}" if again == "source" else first, second)
    kept = json.loads((second / "config.json").read_text())
    assert {**kept["dgnet"], "version": ""} == {**config["dgnet"], "version": ""}
    assert kept["pretrained_cfg"]["license"] == "mit"
    assert "dgnet train --epochs 3" in (second / "README.md").read_text()
    publish(first, second, evaluation={"top1": 92.0}, license="apache-2.0")
    renewed = json.loads((second / "config.json").read_text())
    assert renewed["dgnet"]["top1"] == 92.0
    assert "images" not in renewed["dgnet"]
    assert renewed["pretrained_cfg"]["license"] == "apache-2.0"
