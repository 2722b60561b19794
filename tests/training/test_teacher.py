from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dgnet
from dgnet.checkpoint import load_checkpoint
from dgnet.data import Preprocessing
from dgnet.errors import UsageError
from dgnet.training import TrainConfig, read_run, train
from dgnet.training._teacher import Teacher, build_teacher
from tests.helpers.runs import options

SMALL = {"channels": [4, 4, 4]}
PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
NAMES = ["dark", "light"]


@pytest.fixture(scope="module")
def static(data, tmp_path_factory) -> Path:
    """A run of a static network. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("teacher") / "static"
    train(TrainConfig(**options(data, folder, epochs=1, model="resnet20", model_kwargs=SMALL)))
    return folder


def test_the_loss_is_the_divergence_at_the_temperature():
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    teachers = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.5, 3.0]])
    teacher = Teacher(lambda images: teachers, temperature=3.0)
    expected = []
    for own, other in zip(logits.tolist(), teachers.tolist(), strict=True):
        p, q = ([math.exp(v / 3) / sum(math.exp(w / 3) for w in values) for v in values] for values in (other, own))
        expected.append(9 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert teacher.losses(logits, torch.zeros(2)).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert expected[1] == pytest.approx(0)


def test_a_run_is_a_teacher_with_its_own_normalisation(static):
    config = TrainConfig(model_kwargs=SMALL, teacher=str(static))
    teacher = build_teacher(config, NAMES, PREPROCESSING)
    checkpoint = load_checkpoint(static)
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std)
    )
    with torch.no_grad():
        expected = checkpoint.build_network()((pixels - mean) / std)
    torch.testing.assert_close(teacher((pixels - 0.5) / 0.2), expected, rtol=1e-4, atol=1e-5)
    assert not teacher.network.training


def test_the_original_is_the_static_network_with_the_weights_from_which_training_starts(static):
    weights = str(static / "model.safetensors")
    config = TrainConfig(model_kwargs=SMALL, weights=weights, teacher="original", budget=0.7)
    teacher = build_teacher(config, NAMES, PREPROCESSING)
    assert type(teacher.network) is type(dgnet.create_model("resnet20"))
    expected = load_file(weights)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in teacher.network.state_dict().items())


def test_a_converted_network_follows_what_it_was_converted_from(data, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(dgnet.create_model("test_convnext", num_classes=2).state_dict(), weights)
    more = {"model": "test_convnext", "dynamic": True, "weights": str(weights), "teacher": "original", "model_kwargs": {}}
    teacher = build_teacher(TrainConfig(**more, budget=0.9), NAMES, replace(PREPROCESSING, image_size=(32, 32)))
    expected = load_file(weights)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in teacher.network.state_dict().items())
    tuned = {"layer_decay": 0.8, "router_lr": 2.0, "freeze": "1", "freeze_epochs": 1, "drop_path": 0.1, "mixup": 0.2}
    result = train(TrainConfig(**options(data, tmp_path / "run", **{"epochs": 2, "image_size": 32, **more, **tuned})))
    assert result.metrics["epoch"] == 1


def test_the_outputs_of_a_teacher_are_in_the_order_of_the_datas_classes(static):
    images = torch.randn(2, 3, 8, 8)
    config = TrainConfig(model_kwargs=SMALL, teacher=str(static))
    one, other = (build_teacher(config, names, PREPROCESSING) for names in (NAMES, NAMES[::-1]))
    assert torch.equal(one(images).flip(1), other(images))
    started = TrainConfig(model_kwargs=SMALL, weights=str(static), teacher="original")
    one, other = (build_teacher(started, names, PREPROCESSING) for names in (NAMES, NAMES[::-1]))
    assert torch.equal(one(images).flip(1), other(images))


def test_a_file_without_a_description_is_of_the_static_network(static, tmp_path):
    save_file(load_file(static / "model.safetensors"), tmp_path / "plain.safetensors")
    config = TrainConfig(model_kwargs=SMALL, teacher=str(tmp_path / "plain.safetensors"))
    found = build_teacher(config, NAMES, PREPROCESSING).fingerprint()
    assert found == build_teacher(TrainConfig(model_kwargs=SMALL, teacher=str(static)), NAMES, PREPROCESSING).fingerprint()


def test_the_teacher_decides_alone_if_its_share_is_one(data, static, tmp_path):
    """With the whole loss from the teacher the labels do not matter: another smoothing gives the same weights."""
    found = []
    for smoothing in (0.0, 0.9):
        folder = tmp_path / str(smoothing)
        more = {"epochs": 1, "teacher": str(static), "teacher_weight": 1.0, "label_smoothing": smoothing}
        train(TrainConfig(**options(data, folder, **more)))
        found.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert found[0].keys() == dgnet.create_model("dg_resnet20", num_classes=2, **SMALL).state_dict().keys()


def test_a_run_does_not_continue_with_another_teacher(data, static, tmp_path):
    weights, run = tmp_path / "w.safetensors", tmp_path / "run"
    tensors = load_file(static / "model.safetensors")
    save_file(tensors, weights)
    train(TrainConfig(**options(data, run, epochs=2, weights=str(weights), teacher="original", evaluate_every=1)))
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(stored["teacher"]) == 64
    assert not [name for name in stored["state_dict"] if "teacher" in name]
    (run / "metrics.csv").write_text("".join((run / "metrics.csv").read_text().splitlines(keepends=True)[:2]))
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights)
    with pytest.raises(UsageError, match="--teacher original has other weights than when the run began"):
        train(read_run(run, {}, TrainConfig)[0], run)


def refused(**given: object) -> str:
    with pytest.raises(UsageError) as caught:
        build_teacher(TrainConfig(**{"model_kwargs": SMALL, **given}), NAMES, PREPROCESSING)
    return str(caught.value)


def test_what_cannot_be_a_teacher_is_one_line(static, tmp_path, monkeypatch):
    assert "is no run folder, checkpoint, or name of a model" in refused(teacher=str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="--teacher original has random weights"):
        TrainConfig(teacher="original")
    with pytest.raises(UsageError, match="--teacher-weight needs --teacher"):
        TrainConfig(teacher_weight=0.9)
    other = dgnet.create_model("resnet20", num_classes=5, **SMALL)
    save_file(other.state_dict(), tmp_path / "five.safetensors")
    line = refused(teacher="original", weights=str(tmp_path / "five.safetensors"))
    assert line == (
        "--teacher original was trained for other classes in five.safetensors, and the data have 2; train a static network on"
        " these data first, and name its run: --teacher RUN"
    )
    config = TrainConfig(model_kwargs=SMALL, teacher=str(static))
    with pytest.raises(UsageError, match=r"was trained for 2 classes \(dark, …\), and the data have 2 \(cat, …\)"):
        build_teacher(config, ["cat", "dog"], PREPROCESSING)
    dynamic = dgnet.create_model("dg_resnet20", num_classes=2, **SMALL)
    save_file(dynamic.state_dict(), tmp_path / "dynamic.safetensors")
    line = refused(teacher="original", weights=str(tmp_path / "dynamic.safetensors"))
    assert line.startswith("--teacher original needs weights of resnet20 (")

    def create(model: str, asked: str, instead: str, **options: object) -> object:
        return dgnet.create_model(model, **SMALL, num_classes=7)

    monkeypatch.setattr("dgnet.training._teacher.create_pretrained", create)
    assert refused(teacher="resnet20").startswith("--teacher resnet20 was trained for 7 classes, and the data have 2")


def test_published_weights_that_are_not_there_are_one_line(tmp_path, monkeypatch):
    def train_with(**given: object) -> str:
        with pytest.raises(UsageError) as caught:
            train(TrainConfig(output=str(tmp_path / "run"), **given))
        return str(caught.value)

    line = "--pretrained true: no weights of dg_resnet56 are published; use --weights FILE"
    assert train_with(pretrained=True, model="dg_resnet56") == line

    def fail(*arguments: object, **more: object) -> None:
        raise FileNotFoundError("cannot find the file on the Hub")

    monkeypatch.setattr("timm.create_model", fail)
    line = "--pretrained true: the weights of resnet18 cannot be downloaded (no connection, and no copy on this machine)"
    assert train_with(pretrained=True, model="resnet18").startswith(line)
    with pytest.raises(UsageError, match="--pretrained true and --weights both say where training starts"):
        TrainConfig(pretrained=True, weights="w")
