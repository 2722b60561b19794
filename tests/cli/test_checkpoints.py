"""What a run's weights start, and checkpoints that are damaged or of another network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dgnet
from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.graph import accept_cuts
from tests.helpers.command import QUICK, ask, refuse
from tests.helpers.data import write_folder


def test_the_safetensors_file_loads_by_name(run):
    model = dgnet.create_model("dg_resnet20", num_classes=2, channels=(4, 4, 4), checkpoint_path=str(run / "model.safetensors"))
    state = load_checkpoint(run).state_dict
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_checkpoints_hold_tensors_and_plain_values(run):
    for path in (run / "checkpoints").iterdir():
        assert torch.load(path, weights_only=True)["dgnet"]["class_names"] == ["dark", "light"]


def test_weights_start_a_run_and_reset_another_head(run, images, tmp_path, capsys):
    options = ["--epochs", 1, "--lr", 1e-9, *QUICK[:-2], "--weights", run]
    assert main([str(a) for a in ["train", "--data", images, "--output", tmp_path / "same", *options]]) == 0
    assert f"{run}: kept the classifier of 2 classes\n" in capsys.readouterr().err
    before, after = load_checkpoint(run).state_dict, load_checkpoint(tmp_path / "same").state_dict
    torch.testing.assert_close(before["fc.weight"], after["fc.weight"])
    write_folder(tmp_path / "three", {"a": 4, "b": 4, "c": 4})
    three = ["--data", tmp_path / "three", "--val-data", tmp_path / "three"]
    capsys.readouterr()
    assert main([str(a) for a in ["train", *three, "--output", tmp_path / "other", *options]]) == 0
    assert "reset fc.weight, fc.bias to 3 classes" in capsys.readouterr().err
    after = load_checkpoint(tmp_path / "other").state_dict
    torch.testing.assert_close(before["conv1.weight"], after["conv1.weight"])
    assert after["fc.weight"].shape == (3, 4)


def test_weights_of_the_static_network_start_a_dynamic_one(images, tmp_path, capsys):
    options = ["--data", images, "--epochs", 1, "--lr", 1e-9, *QUICK[:-2]]
    ask(capsys, "train", "--model", "resnet20", "--output", tmp_path / "static", *options)
    arguments = ["train", "--weights", tmp_path / "static", "--output", tmp_path / "dynamic", *options]
    assert main([str(argument) for argument in arguments]) == 0
    assert "stayed as initialised: layer1.weighting.tau, layer1.weighting" in capsys.readouterr().err
    static, dynamic = (load_checkpoint(tmp_path / name).state_dict for name in ("static", "dynamic"))
    torch.testing.assert_close(dynamic["layer2.nodes.1.conv1.weight"], static["layer2.1.conv1.weight"])
    line = refuse(capsys, "train", "--model", "dg_resnet32", "--weights", tmp_path / "static", *options)
    assert "is a checkpoint of resnet20, not of dg_resnet32 as asked for (these are not the weights of the static" in line


@pytest.mark.slow
def test_a_dynamic_network_starts_as_the_static_one(images, tmp_path, capsys):
    options = ["--data", images, "--epochs", 1, "--lr", 1e-9, *QUICK[:-2]]
    ask(capsys, "train", "--model", "resnet20", "--output", tmp_path / "resnet20", *options)
    words = ["train", "--weights", tmp_path / "resnet20", *options]
    for start, is_lossy in (("paper", True), ("static", False)):
        assert main([str(word) for word in [*words, "--start", start, "--output", tmp_path / start]]) == 0
        assert ("; --start static keeps it" in capsys.readouterr().err) == is_lossy
    # The run holds the options, so it can be repeated and continued; `static` again finds no contradiction.
    config = load_checkpoint(tmp_path / "static").config
    assert (config["shortcut"], config["start"]) == ("node", "static")
    assert config["model_kwargs"].items() >= {"unit_start": True, "router_start": "chain", "channels": [4, 4, 4]}.items()
    ask(capsys, "train", "--config", tmp_path / "static" / "config.yaml", "--output", tmp_path / "again")
    first, second = (load_checkpoint(tmp_path / name).state_dict for name in ("static", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "again" / "checkpoints" / "last.ckpt").unlink()  # as if it had been killed before its first checkpoint
    (tmp_path / "again" / "metrics.csv").unlink()
    ask(capsys, "train", "--resume", tmp_path / "again")
    words = [*words, "--start", "static", "--output", tmp_path / "x"]
    assert "needs --shortcut node, got 'edge'" in refuse(capsys, *words, "--shortcut", "edge")
    assert "a closed gate would cut it" in refuse(capsys, *words, "--budget", 0.7)
    assert "CifarResNet does not: leave it out" in refuse(capsys, *words, "--model", "resnet20")
    words = ["train", "--start", "static", "--output", tmp_path / "x", *options]
    assert "--start static has no effect without --weights" in refuse(capsys, *words)
    assert "has others; leave out --start" in refuse(capsys, *words, "--weights", tmp_path / "paper")


def test_gates_that_cut_a_stage_are_refused_but_those_that_were_trained_load(images, tmp_path, capsys):
    words = ["train", "--data", images, "--epochs", 1, "--topology", "chain", *QUICK, "--output", tmp_path / "run"]
    assert "stage 1: --model-kwargs.node_gate hard is not possible here" in refuse(capsys, *words, "--budget", 0.9)
    with accept_cuts():  # as an older version
        ask(capsys, *words, "--budget", 0.9)
    assert "executed multiply-adds" in ask(capsys, "evaluate", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    (tmp_path / "run" / "metrics.csv").unlink()
    ask(capsys, "train", "--resume", tmp_path / "run")


def test_weights_of_another_model(run, images, tmp_path, capsys):
    line = refuse(
        capsys, "train", "--data", images, "--model", "dg_resnet32", "--weights", run, "--output", tmp_path / "x", *QUICK
    )
    assert "is a checkpoint of dg_resnet20, not of dg_resnet32 as asked for" in line
    options = ["--weighting", "learned", "--output", tmp_path / "x", *QUICK]
    line = refuse(capsys, "train", "--data", images, "--weights", run, *options)
    assert "is of dg_resnet20 with other options" in line
    assert "; add: --weighting routed" in line
    torch.save({"a": torch.zeros(1)}, tmp_path / "raw.pth")
    line = refuse(capsys, "train", "--data", images, "--weights", tmp_path / "raw.pth", "--output", tmp_path / "x", *QUICK)
    assert "does not hold the weights of dg_resnet20" in line
    assert "holds weights only" in refuse(capsys, "evaluate", tmp_path / "raw.pth")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_truncated_checkpoint(run, tmp_path, suffix, capsys):
    source = run / "model.safetensors" if suffix == ".safetensors" else run / "checkpoints" / "last.ckpt"
    path = tmp_path / f"cut{suffix}"
    for share in (0.0, 0.3, 0.9):
        path.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
        expected = "is truncated or no checkpoint" if share else "is empty; copy it again"
        assert expected in refuse(capsys, "evaluate", path)


def test_a_checkpoint_that_carries_code_is_not_run(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"state_dict": {}, "dgnet": Attack()}, tmp_path / "evil.ckpt")
    for arguments in (["evaluate", tmp_path / "evil.ckpt"], ["train", "--weights", tmp_path / "evil.ckpt"]):
        assert "carries pickled code and was not loaded" in refuse(capsys, *arguments)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_whose_description_is_damaged(run, tmp_path, capsys):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    described, weights = content["dgnet"], content["state_dict"]

    def preprocessing(**changes):
        return {"dgnet": {**described, "preprocessing": {**described["preprocessing"], **changes}}}

    def describe(**changes):
        return {"dgnet": {**described, **changes}}

    name = next(iter(weights))
    for damage, expected in (
        ({"dgnet": {}}, "lacks model"),
        ({"dgnet": "x"}, "is no dict"),
        ({"state_dict": None}, "holds no state dict"),
        ({"state_dict": {}}, "holds no state dict"),
        ({"state_dict": {1: torch.zeros(1)}}, "holds no state dict"),
        ({"state_dict": {**weights, name: torch.full_like(weights[name], float("nan"))}}, "holds values that are not finite"),
        ({"state_dict": {**weights, name: weights[name].int()}}, "holds int32 numbers, not floating-point ones"),
        ({"state_dict": {**weights, name: weights[name].cfloat()}}, "holds complex64 numbers, not floating-point ones"),
        (preprocessing(image_size="ab"), "image_size must be a list of 2 whole numbers, got 'ab'"),
        (preprocessing(image_size=[16]), "image_size must be a list of 2 whole numbers, got [16]"),
        (preprocessing(image_size=[16, 0]), "image_size must be 1 to 10000, got 0"),
        (preprocessing(image_size=[16, 10**9]), "image_size must be 1 to 10000, got 1000000000"),
        (preprocessing(std=[1, 1, 0]), "std must be above 0, got 0.0"),
        (preprocessing(std=[1, 1, 1e-300]), "std must be 1e-06 to 1000000, got 1e-300"),
        (preprocessing(mean=[1, 1, 1e300]), "mean must be -1000000 to 1000000, got 1e+300"),
        (preprocessing(interpolation="random"), "unknown interpolation 'random'"),
        (describe(config={**described["config"], "max_pixels": -1}), "max_pixels must be above 0"),
        (preprocessing(std=[1, 1, float("nan")]), "std[2] must be a finite number, got nan"),
        (preprocessing(mean=[]), "mean and std must have 3 values each"),
        (preprocessing(mean=[[1], 1, 1]), "mean[0] must be a number, got [1]"),
        (preprocessing(interpolation="cubic"), "unknown interpolation 'cubic'; did you mean 'bicubic'?"),
        (preprocessing(crop_pct=0), "crop_pct must be 0.01 to 2, got 0.0"),
        (preprocessing(colour=1), "unknown entry 'colour'"),
        (describe(model="dg_resnet32"), "its weights are not those of dg_resnet32"),
        (describe(model=None), "model must be text, got null"),
        (describe(model="dg_resnet2O"), "damaged.ckpt: unknown model 'dg_resnet2O'; did you mean"),
        (describe(model_kwargs={"num_classes": 5}), "model_kwargs sets num_classes"),
        (describe(model_kwargs={1: 2}), "names must be text, got 1"),
        (describe(model_kwargs=[]), "model_kwargs must be a dict, got []"),
        (describe(class_names=[None, "1"]), "class_names[0] must be text, got null"),
        (describe(class_names=[]), "names no classes"),
        (describe(class_names="ab"), "class_names must be a list of texts, got 'ab'"),
        (describe(config={}), "does not say where the data of its run is; name data with --data"),
        (describe(config={"data": [5]}), "data must be a path, got [5]"),
        (describe(config={**described["config"], "holdout": -5}), "holdout must be at least 0, got -5"),
        (describe(config={**described["config"], "on_bad_image": 3}), "unknown on_bad_image '3'"),
        (describe(task="segment"), "unknown task 'segment'"),
    ):
        torch.save({**content, "state_dict": weights, **damage}, tmp_path / "damaged.ckpt")
        assert expected in refuse(capsys, "evaluate", tmp_path / "damaged.ckpt"), damage
