"""Grey images, and a normalisation of the user's own: from training to evaluation, prediction and export."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dgnet.checkpoint import load_checkpoint
from dgnet.files import read_table
from dgnet.models import create_model
from tests.helpers.command import QUICK, ask, refuse


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["false", "true"])
def test_a_network_of_grey_images_is_trained_evaluated_and_exported(images, tmp_path, capsys, cache):
    run = tmp_path / "run"
    words = ["--in-chans", 1, "--mean", "[0.4]", "--std", "[0.25]", "--augment", "none", "--epochs", 1, "--cache", cache]
    ask(capsys, "train", "--data", images, "--output", run, *QUICK, *words)
    checkpoint = load_checkpoint(run)
    assert (checkpoint.preprocessing.mean, checkpoint.preprocessing.std) == ((0.4,), (0.25,))
    network = checkpoint.build_network()
    assert network.conv1.in_channels == 1
    photo = images / "val" / "light" / "0.jpg"
    grey = checkpoint.preprocessing.evaluation_transform()(Image.open(photo).convert("RGB"))
    torch.testing.assert_close(grey, torch.full((1, 8, 8), (200 / 255 - 0.4) / 0.25))
    row = read_table(run / "metrics.csv")[-1]
    assert json.loads(ask(capsys, "evaluate", run, "--json"))["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)
    predicted = json.loads(ask(capsys, "predict", run, photo, "--json"))[0]
    with torch.no_grad():
        assert predicted["probabilities"] == pytest.approx(
            network(grey[None])[0].softmax(0).sort(descending=True).values.tolist()
        )
    if cache == "false":
        ask(capsys, "export", run, "--output", tmp_path / "grey.onnx")
        shape = onnx.load(tmp_path / "grey.onnx").graph.input[0].type.tensor_type.shape
        assert [dim.dim_value for dim in shape.dim[1:]] == [1, 8, 8]


def test_grey_training_starts_from_weights_for_rgb(images, tmp_path, capsys):
    trained = create_model("resnet20", num_classes=2, channels=[4, 4, 4])
    save_file(trained.state_dict(), tmp_path / "rgb.safetensors")
    words = ["--in-chans", 1, "--weights", tmp_path / "rgb.safetensors", "--epochs", 1, "--lr", 1e-12, "--model", "resnet20"]
    ask(capsys, "train", "--data", images, "--output", tmp_path / "run", *QUICK, *words)
    weight = load_checkpoint(tmp_path / "run").build_network().conv1.weight
    torch.testing.assert_close(weight, trained.conv1.weight.sum(1, keepdim=True))


def test_channels_and_values_that_do_not_fit_are_refused(images, tmp_path, capsys):
    words = ["train", "--data", images, "--output", tmp_path / "run", *QUICK]
    for options, message in (
        (["--in-chans", 4], "--in-chans must be 1 or 3, got 4: images are read as grey (1) or RGB (3)"),
        (["--in-chans", 0], "--in-chans must be at least 1, got 0"),
        (["--mean", "[0.1, 0.2]"], "--mean must have one value, or one for each of 3 channels, got [0.1, 0.2]"),
        (["--in-chans", 1, "--std", "[0.1, 0.2, 0.3]"], "--std must have one value, got [0.1, 0.2, 0.3]"),
        (["--std", "[0]"], "std must be above 0, got 0"),
        (["--model-kwargs", "{in_chans: 1}"], "--model-kwargs cannot set in_chans: dgnet train has --in-chans"),
    ):
        assert message in refuse(capsys, *words, *options)
        assert not (tmp_path / "run").exists()


def test_a_transformer_is_trained_at_another_size_than_its_own(images, tmp_path, capsys):
    words = ["--model", "test_vit", "--image-size", 32, "--batch-size", 4, "--epochs", 1, "--lr", 0.01]
    ask(capsys, "train", "--data", images, "--output", tmp_path / "run", *words)
    assert load_checkpoint(tmp_path / "run").model_kwargs == {"img_size": 32}
    assert json.loads(ask(capsys, "evaluate", tmp_path / "run", "--json"))["images"] == 6
