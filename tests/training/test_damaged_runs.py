"""Files of a run folder that somebody edited, or that a disk damaged: one line and status 2, never another result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dgnet.cli import main
from dgnet.training import Interrupted, TrainConfig, train
from tests.helpers.runs import options

ALIAS_BOMB = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))])


@pytest.fixture(scope="module")
def half(data, tmp_path_factory) -> Path:
    """A run of two epochs that was interrupted after the first."""
    from dgnet.training._checkpointing import Checkpointing

    folder = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as patch:
        saved = Checkpointing.on_train_epoch_end

        def interrupt(self: Any, trainer: Any, module: Any) -> None:
            self.signum = 15
            saved(self, trainer, module)

        patch.setattr(Checkpointing, "on_train_epoch_end", interrupt)
        with pytest.raises(Interrupted):
            train(TrainConfig(**options(data, folder, epochs=2)))
    return folder


@pytest.fixture
def run(half, tmp_path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def refuse(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    status = main([str(word) for word in words])
    output, errors = capsys.readouterr()
    assert status == 2, (output, errors)
    assert output == ""
    return errors.splitlines()[-1]


EDITED: list[tuple[dict[str, Any], str]] = [
    ({"model": 5}, "--model is '5', and the run was trained with 'dg_resnet20'"),
    ({"data": None}, "--data must be a path, got null"),
    ({"workers": None}, "--workers must be a whole number, got null"),
    ({"lr": None}, "--lr must be a number, got null"),
    ({"lr": "0.1"}, "--lr must be a number, got '0.1'"),
    ({"lr": 0.25}, "--lr is 0.25, and the run was trained with"),
    ({"lr": 10**30}, "is out of range"),
    ({"batch_size": 8.0}, "--batch-size must be a whole number, got 8.0"),
    ({"batch_size": 7}, "--batch-size is 7, and the run was trained with"),
    ({"batch_size": 10**400}, "is out of range"),
    ({"threads": 1.5}, "--threads must be a whole number or null, got 1.5"),
    ({"model_kwargs": 5}, "--model-kwargs must be a dict, got 5"),
    ({"model_kwargs": {1: 2}}, "--model-kwargs: names must be text, got 1"),
    ({"model_kwargs": {"router_bias": float("nan")}}, "--model-kwargs router_bias must be a finite number, got nan"),
    ({"compile": "maybe"}, "--compile must be true or false, got 'maybe'"),
    ({"seed": True}, "--seed must be a whole number, got true"),
    ({"seed": -1}, "--seed must be 0 to 4294967295, got -1"),
    ({"loggers": [5]}, "--loggers[0] must be a dict, got 5"),
    ({"output": ""}, "--output must not be empty"),
    ({"epochs": 3}, "--epochs is 3, and the run was trained with 2"),
    ({"epocks": 3}, "is not from a run of dgnet train, which has no --epocks"),
]


@pytest.mark.parametrize(("change", "expected"), EDITED, ids=[str(change)[:40] for change, _ in EDITED])
def test_an_edited_configuration(change, expected, run, capsys):
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(yaml.safe_dump({**values, **change}), encoding="utf-8")
    line = refuse(capsys, "train", "--resume", run)
    assert expected in line
    assert "config.yaml" in line
    assert len(line) < 500


TEXTS = [
    ("", "must be a mapping, got null"),
    ("5", "must be a mapping, got 5"),
    ("- 1", "must be a mapping, got [1]"),
    ("epochs: [", "is not valid YAML"),
    ("lr: 0.1\nlr: 0.2", "line 2: 'lr' is given twice"),
    ("lr: " + "[" * 3000, "nested too deep"),
    (ALIAS_BOMB, "expand to more than"),
    ("lr: &a [*a]", "refers to itself"),
    ("lr: !!python/name:os.system", "the tag"),
    ("output: 'a\\0b'\nlr: \"a\\0b\"", "must be"),
    (b"\xff\xfe\x00", "it is not UTF-8 text"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[str(text)[:20] for text, _ in TEXTS])
def test_a_configuration_or_recipe_that_is_no_list_of_options(text, expected, run, capsys):
    (run / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refuse(capsys, "train", "--resume", run)
    if text:  # an empty recipe sets nothing
        line = refuse(capsys, "train", "--config", run / "config.yaml", "--output", run / "new")
        assert expected in line or "must hold options" in line
    assert not (run / "new").exists()


METRICS = [
    (b"what is this\n", "metrics.csv lacks the column epoch"),
    (b"what,is\nthis,not\n", "metrics.csv lacks the column epoch"),
    (b"", "metrics.csv lacks the column epoch"),
    (b"epoch,train_loss\n0,1\n", "metrics.csv lacks the column step"),
    (b"epoch,step\n0,\n", "metrics.csv: row 1: step must be a whole number, got ''"),
    (b"epoch,step\n0,5\n1\n", "row 2 has another number of cells than the header"),
    (b"epoch,step\n0,-5\n", "step must be at least 0, got -5"),
    (b"epoch,step,val_top1\n0,5,a lot\n", "val_top1 must be a number, got 'a lot'"),
    (b"epoch,step,epoch\n0,5,1\n", "metrics.csv has the column 'epoch' twice"),
    (b"epoch,step\n0x1,5\n", "epoch must be a number"),
    (b"epoch,step\n\xff,5\n", "it is not UTF-8 text"),
    (b"epoch,step\n0,5\0\n", "must be a"),
    (b'epoch,step\n0,"5\n', "is no table of comma-separated values"),
]


@pytest.mark.parametrize(("content", "expected"), METRICS, ids=[str(content) for content, _ in METRICS])
def test_metrics_that_are_no_table(content, expected, run, tmp_path, capsys):
    (run / "metrics.csv").write_bytes(content)
    assert expected in refuse(capsys, "train", "--resume", run)
    assert expected in refuse(capsys, "analyze", "--curves", run, "--output", tmp_path / "curves")
    assert (run / "metrics.csv").read_bytes() == content


def test_metrics_of_another_run_do_not_finish_this_one(run, capsys):
    (run / "metrics.csv").write_text("epoch,step\n0,5\n7,40\n", encoding="utf-8")
    assert "its last row is of epoch 7, counted from 0, and the run has 2" in refuse(capsys, "train", "--resume", run)


def test_a_configuration_without_data_does_not_fall_back_to_other_images(run, capsys):
    lines = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    (run / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith("data:")), encoding="utf-8")
    assert "config.yaml lacks --data" in refuse(capsys, "train", "--resume", run)


def damages(content: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Damaged contents of last.ckpt, and a part of the line."""
    state = content["state_dict"]
    name = next(iter(state))
    momentum = content["optimizer_states"][0]
    changed = {index: {"momentum_buffer": torch.zeros(3)} for index in momentum["state"]}
    without = {key: {k: v for k, v in content.items() if k != key} for key in content}
    return {
        **{f"no {key}": (without[key], f"lacks {key}") for key in ("global_step", "loops", "optimizer_states", "state_dict")},
        **{f"no {key}": (without[key], f"lacks {key}") for key in ("callbacks", "lr_schedulers")},
        "no description": (without["dgnet"], "the description of its network lacks"),
        "step below 0": ({**content, "global_step": -5}, "global_step must be at least 0, got -5"),
        "step as text": ({**content, "global_step": "5"}, "global_step must be a whole number, got '5'"),
        "other step": ({**content, "global_step": content["global_step"] + 1}, "is damaged"),
        "empty loops": ({**content, "loops": {}}, "lacks loops"),
        "half of loops": ({**content, "loops": {"fit_loop": {}}}, "is damaged"),
        "loops as text": ({**content, "loops": "x"}, "is damaged"),
        "a weight of another shape": ({**content, "state_dict": {**state, name: torch.zeros(1)}}, "is damaged"),
        "a weight less": ({**content, "state_dict": {k: v for k, v in state.items() if k != name}}, "is damaged"),
        "another optimizer": ({**content, "optimizer_states": [{"state": {}, "param_groups": []}]}, "is damaged"),
        "momentum of another shape": ({**content, "optimizer_states": [{**momentum, "state": changed}]}, "is damaged"),
        "no tensors": (dict.fromkeys(content, 5), "is damaged"),
    }


DAMAGES = (
    *("no global_step", "no loops", "no optimizer_states", "no state_dict", "no callbacks", "no lr_schedulers"),
    *("no description", "step below 0", "step as text", "other step", "empty loops", "half of loops", "loops as text"),
    *("a weight of another shape", "a weight less", "another optimizer", "momentum of another shape", "no tensors"),
)


@pytest.mark.parametrize("version", ["this", "0.1"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_a_run_cannot_continue_from(damage, version, run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    content, expected = damages(torch.load(last, weights_only=True))[damage]
    if version == "0.1":  # it wrote no fingerprint
        content.pop("fingerprint", None)
        if damage == "momentum of another shape":
            pytest.skip("only the fingerprint tells")
    torch.save(content, last)
    line = refuse(capsys, "train", "--resume", run)
    assert expected in line
    assert "last.ckpt" in line


def test_the_table_of_damages_is_whole(run):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(DAMAGES) == set(damages(content))


def test_left_over_files_and_folders_are_no_matter(run, capsys):
    (run / ".x.part").mkdir()
    (run / "checkpoints" / ".last.ckpt.part").write_bytes(b"half")
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / ".x.part").is_dir()
    assert not (run / "checkpoints" / ".last.ckpt.part").exists()


def test_numbers_of_yaml_mean_the_same_to_resume_and_to_a_recipe(run, capsys):
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    old = f"weight_decay: {values['weight_decay']}"
    assert old in text
    path.write_text(text.replace(old, "weight_decay: 5e-4"), encoding="utf-8")
    assert main(["train", "--resume", str(run)]) == 0
    path.write_text(path.read_text(encoding="utf-8").replace("devices: '1'", "devices: 1"), encoding="utf-8")
    assert "devices: 1\n" in path.read_text(encoding="utf-8")
    assert main(["train", "--resume", str(run)]) == 0
