"""Weights without dgnet's description, in place of a checkpoint: `--model NAME --weights FILE`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.models import create_model
from tests.helpers.command import ask, refuse
from tests.helpers.data import SHARED_DATA, write_folder


def note(capsys, *words: object) -> str:
    """What the command, which must succeed, writes on stderr."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().err


SMALL = ["--model-kwargs", "{channels: [4, 4, 4]}", "--image-size", 8]


@pytest.fixture
def bare(run, tmp_path):
    """The weights of `run`, without its description."""
    save_file(load_checkpoint(run).state_dict, tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


def test_a_bare_file_gives_what_its_checkpoint_gives(run, bare, images, tmp_path, capsys):
    words = ["--model", "dg_resnet20", *SMALL]
    for how in (["--weights", bare], [bare], [f"--weights={bare}"]):
        assert ask(capsys, "evaluate", *how, *words, "--data", images, "--json") == ask(capsys, "evaluate", run, "--json")
    (tmp_path / "names.txt").write_text("dark\nlight\n")
    photos = sorted((images / "val" / "dark").iterdir())
    expected = ask(capsys, "predict", run, *photos, "--json")
    assert (
        ask(capsys, "predict", *photos, *words, "--class-names", tmp_path / "names.txt", "--weights", bare, "--json")
        == expected
    )
    numbered = json.loads(ask(capsys, "predict", "--weights", bare, *words, *photos, "--json"))
    assert {name for photo in numbered for name in photo["classes"]} == {"class 0", "class 1"}


@pytest.mark.slow
def test_a_bare_file_is_analysed_and_exported(bare, images, tmp_path, capsys):
    words = ["--model", "dg_resnet20", *SMALL]
    found = json.loads(ask(capsys, "analyze", "--weights", bare, *words, "--data", images, "--explorer", 0, "--json"))
    assert found["model"] == "dg_resnet20"
    ask(capsys, "export", "--weights", bare, *words, "--format", "torch", "--output", tmp_path / "net.pt2")


def test_the_file_gives_classes_and_channels_and_the_model_its_preprocessing(tmp_path, images, capsys):
    static = create_model("test_efficientnet.r160_in1k", num_classes=3, in_chans=1)
    save_file(static.state_dict(), tmp_path / "a.safetensors")
    data = write_folder(tmp_path / "data", {"a": 1, "b": 1, "c": 1})
    words = ["evaluate", "--model", "test_efficientnet.r160_in1k", "--weights", tmp_path / "a.safetensors"]
    result = json.loads(ask(capsys, *words, "--data", data, "--json"))
    assert set(result["executed_by_class"]) == {"a", "b", "c"}
    cfg = static.pretrained_cfg
    mean, std = ([round(sum(cfg[name]) / 3, 4)] for name in ("mean", "std"))
    expected = f"in the order of {data} ('a', …), 160×160 pixels, {cfg['interpolation']}, crop {cfg['crop_pct']}"
    assert f"{expected}, mean {mean}, std {std}\n" in note(capsys, *words, "--data", data)
    line = refuse(capsys, *words, "--data", images)
    assert "has 2 classes, the network 3; use data with the network's classes" in line


def test_static_weights_in_a_dynamic_network_say_what_is_untrained(tmp_path, images, capsys):
    save_file(create_model("resnet20", num_classes=2, channels=[4, 4, 4]).state_dict(), tmp_path / "a.safetensors")
    words = ["evaluate", "--model", "dg_resnet20", "--weights", tmp_path / "a.safetensors", *SMALL, "--data", images]
    first = json.loads(ask(capsys, *words, "--json"))
    assert first == json.loads(ask(capsys, *words, "--json"))  # what is initialised is the same in every call
    assert "stayed as initialised: layer1" in note(capsys, *words)


def test_mistakes_with_weights(run, bare, images, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    headless = tmp_path / "headless.safetensors"
    save_file({name: t for name, t in load_checkpoint(run).state_dict.items() if not name.startswith("fc.")}, headless)
    (tmp_path / "names.txt").write_text("dark\n")
    model = ["--model", "dg_resnet20", *SMALL]
    for words, message in (
        (
            ["evaluate", "--weights", bare],
            "holds weights only, without the model's name and classes; name the model with --model",
        ),
        (
            ["evaluate", run, "--model", "resnet18"],
            "is a checkpoint of dg_resnet20 with its own classes and preprocessing; leave",
        ),
        (["evaluate", run, "--image-size", 8], "--image-size is for weights whose file does not say it; add --model NAME"),
        (["evaluate", "--weights", bare, *model], "does not say where the data of its run is; name data with --data"),
        (
            ["evaluate", "--weights", other, *model],
            "does not hold the weights of dg_resnet20 with a classifier (it lacks fc.weight); name the network whose weights",
        ),
        (["evaluate", "--weights", headless, *model], "with a classifier (it lacks fc.weight); use a file that has one"),
        (
            ["predict", "--weights", bare, "--model", "resnet18", "x.jpg"],
            "does not hold the weights of resnet18 (bn1.bias has the shape",
        ),
        (["evaluate", "--weights", bare, "--model", "resnt18"], "unknown model 'resnt18'; did you mean"),
        (["evaluate", "--weights", bare, *model, "--class-names", tmp_path / "names.txt"], "2 classes, and 1 are named"),
        (
            ["evaluate", "--weights", bare, "--model", "dg_resnet20", "--model-kwargs", "{num_classes: 2}"],
            "cannot set num_classes",
        ),
        (["explore", "--weights", tmp_path / "none"], "none does not exist"),
        (["evaluate", run, "--weights", bare, *model], "nrecognized arguments"),
        (["predict", "--weights", bare, *model], "the following arguments are required: images"),
    ):
        assert message in refuse(capsys, *words)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED_DATA / "weights").is_dir(), reason="needs the weights and photos beside the checkout")
def test_timms_weights_have_their_accuracy_on_photos_of_imagenet(capsys):
    words = ["--model", "tf_efficientnet_lite0", "--weights", SHARED_DATA / "weights" / "tf_efficientnet_lite0.safetensors"]
    result = json.loads(ask(capsys, "evaluate", *words, "--data", SHARED_DATA / "imagenet_samples", "--json"))
    assert (result["images"], result["top1"], result["top5"]) == (1000, pytest.approx(84.8), pytest.approx(96.6))


def test_a_converted_network_gives_what_the_static_one_gives(tmp_path, images, capsys):
    save_file(create_model("test_convnext", num_classes=2).state_dict(), tmp_path / "a.safetensors")
    words = [
        "evaluate",
        "--model",
        "test_convnext",
        "--weights",
        tmp_path / "a.safetensors",
        "--image-size",
        32,
        "--data",
        images,
    ]
    static, dynamic = (json.loads(ask(capsys, *words, *more, "--json")) for more in ([], ["--dynamic", "true"]))
    assert (dynamic["top1"], dynamic["loss"]) == (static["top1"], pytest.approx(static["loss"], rel=1e-5))
    assert dynamic["executed_multiply_adds"] > static["executed_multiply_adds"]  # its routers


def test_a_converted_network_of_grey_images_starts_from_static_weights_for_rgb(tmp_path, images, capsys):
    trained = create_model("test_convnext", num_classes=2)
    save_file(trained.state_dict(), tmp_path / "rgb.safetensors")
    words = ["--dynamic", "true", "--in-chans", 1, "--epochs", 1, "--lr", 1e-12, "--batch-size", 4, "--image-size", 32]
    start = ["--model", "test_convnext", "--weights", tmp_path / "rgb.safetensors"]
    ask(capsys, "train", "--data", images, "--output", tmp_path / "run", *start, *words)
    network = load_checkpoint(tmp_path / "run").build_network()
    name = network.pretrained_cfg["first_conv"]
    expected = trained.get_submodule(name).weight.sum(1, keepdim=True)
    torch.testing.assert_close(network.get_submodule(name).weight, expected)
    assert json.loads(ask(capsys, "evaluate", tmp_path / "run", "--json"))["images"] == 6
