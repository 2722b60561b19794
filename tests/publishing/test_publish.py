"""A published network is the trained one, whoever loads it; what cannot be published or loaded is said in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

import dgnet
from dgnet.checkpoint import load_checkpoint, save_tensors
from dgnet.cli.weights import find_results_folder
from dgnet.code import trust_code
from dgnet.detection import Detector, describe_detector, load_detector
from dgnet.errors import UsageError
from dgnet.graph import FixedWeighting
from dgnet.publishing import publish
from tests.helpers.command import ask, refuse
from tests.helpers.hub import HubStub
from tests.helpers.networks import build
from tests.helpers.published import NAMES, NETWORKS, save

MORE = {
    "test_vit": {"dynamic": True, "img_size": 32},
    "dg_resnet18": {"topology": "er"},
    "dg_mobilenetv2_100": {"weighting": "learned"},
    "dg_regnety_006": {"shortcut": "node"},
}
EACH = [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


class Halves(FixedWeighting):
    """A weighting of the user's own."""

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return super().forward(*args, **kwargs) / 2


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_a_published_network_is_the_trained_one(name, tmp_path, images):
    expected = save(tmp_path / "run.safetensors", name, **{**NETWORKS, **MORE}[name])(images)
    source = publish(tmp_path / "run.safetensors", tmp_path / "published").source
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for network in (dgnet.create_model(source), timm.create_model(source, pretrained=True)):
        assert torch.equal(network.eval()(images), expected)
        assert tuple(network.pretrained_cfg["input_size"]) == (3, 32, 32)
    features = timm.create_model(source, pretrained=True, features_only=True).eval()(images)
    assert all(torch.isfinite(feature).all() for feature in features)
    assert timm.create_model(source, pretrained=True, num_classes=2)(images).shape == (3, 2)
    checkpoint = load_checkpoint(source)
    assert checkpoint.class_names == NAMES
    assert torch.equal(checkpoint.build_network()(images), expected)


@torch.no_grad()
def test_a_published_detector_is_the_trained_one(tmp_path):
    options = {"dynamic": True, "node_gate": "hard"}
    network = build("test_resnet", **options)
    detector = {
        "short_side": 32,
        "long_side": 64,
        "fpn_channels": 8,
        "fpn_norm": False,
        "frozen_stages": 0,
        "frozen_norm": False,
    }
    built = Detector(network, 2, **detector).eval()
    described = describe_detector("test_resnet", options, NAMES[:2], {1: 7, 2: 9}, {**detector, "options": {}}, {})
    save_tensors(built.state_dict(), tmp_path / "run.safetensors", described)
    written = publish(tmp_path / "run.safetensors", tmp_path / "published", evaluation={"ap": 31.5, "ap50": 50, "ap75": None})
    assert written.task == "detect"
    assert "| AP | 31.50 |" in (tmp_path / "published" / "README.md").read_text()
    images = [torch.rand(3, 40, 32)]
    expected = built(images)[0]
    for loaded in (dgnet.create_model(written.source), timm.create_model(written.source, pretrained=True)):
        found = loaded.eval()(images)[0]
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert load_detector(written.source).category_ids == {1: 7, 2: 9}
    for option in ("features_only", "drop_path_rat"):
        with pytest.raises(UsageError, match=f"detector has no option '{option}'"):
            dgnet.create_model(written.source, **{option: True})
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    edit(tmp_path / "published", model_args={**config["model_args"], "network": "hf-hub:user/name"})
    with pytest.raises(UsageError, match=r"must name a network of timm or dgnet, got 'hf-hub:user/name'"):
        dgnet.create_model(written.source)


def test_the_base_of_a_converted_network_is_no_other_published_one(tmp_path):
    save(tmp_path / "run.safetensors", "test_resnet", dynamic=True, node_gate="hard")
    source = publish(tmp_path / "run.safetensors", tmp_path / "published").source
    edit(tmp_path / "published", model_args={"base": source})
    with pytest.raises(UsageError, match="must name a network of timm or dgnet"):
        dgnet.create_model(source)


def test_a_card_says_what_was_measured_and_escapes_names(tmp_path):
    save(tmp_path / "run.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    figures = {"top1": 91.25, "images": 1000, "executed_multiply_adds": 123456.7, "executed_by_class": {}}
    publish(tmp_path / "run.safetensors", tmp_path / "published", evaluation=figures, license="mit")
    card = (tmp_path / "published" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "dgnet"
    assert header["license"] == "mit"
    for text in ("91.25 %", "1,000 images", "123,457", "dgnet predict local-dir:"):
        assert text in card
    assert "<b>" not in card
    assert r"a\|b" in card
    assert r"\`code\`" in card
    assert "\n# title" not in card
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert config["dgnet"]["top1"] == 91.25
    assert config["pretrained_cfg"]["license"] == "mit"


def test_code_of_the_users_own_is_run_only_if_trusted(tmp_path, images):
    expected = save(tmp_path / "run.safetensors", "dg_resnet20", channels=(4, 6, 8), weighting=Halves)(images)
    with pytest.raises(UsageError, match=r"code of the package tests .*trust_code=.tests."):
        publish(tmp_path / "run.safetensors", tmp_path / "published")
    with trust_code("tests"):
        source = publish(tmp_path / "run.safetensors", tmp_path / "published").source
    for create in (dgnet.create_model, timm.create_model):
        with pytest.raises(UsageError, match="trust"):
            create(source)
    with pytest.raises(UsageError, match="trust"):
        dgnet.create_model(source, trust_code="other")
    assert torch.equal(dgnet.create_model(source, trust_code="tests").eval()(images), expected)
    config = tmp_path / "published" / "config.json"
    for wrong, message in (
        ("tests.publishing.test_publish.Nothing", "has no Nothing"),
        ("tests.nowhere.X", "cannot be imported"),
    ):
        config.write_text(config.read_text().replace(f"{__name__}.Halves", wrong))
        with pytest.raises(UsageError, match=message):
            dgnet.create_model(source, trust_code="tests")
        config.write_text(config.read_text().replace(wrong, f"{__name__}.Halves"))


def test_the_commands_take_a_published_network(tmp_path, capsys):
    save(tmp_path / "run.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    folder = tmp_path / "published"
    written = json.loads(ask(capsys, "publish", tmp_path / "run.safetensors", "--to", folder, "--json"))
    assert written == {"source": f"local-dir:{folder}", "task": "classify"}
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 40), "red").save(image)
    prediction = json.loads(ask(capsys, "predict", written["source"], image, "--json"))[0]
    assert set(prediction["classes"]) <= set(NAMES)
    assert "published; load it" in ask(capsys, "publish", tmp_path / "run.safetensors", "--to", folder)  # again: replaced


@pytest.mark.parametrize("source", ["local-dir:/some/where", "hf-hub:user/name"])
def test_results_of_a_published_network_go_to_the_current_folder(source):
    assert find_results_folder(source) == Path()


def test_results_of_a_checkpoint_go_beside_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert find_results_folder(str(tmp_path)) == tmp_path
    assert find_results_folder(str(tmp_path / "model.safetensors")) == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: edit(folder, architecture="dg_resnet21"), "unknown network 'dg_resnet21'.*did you mean 'dg_resnet"),
        (lambda folder: edit(folder, architecture=None), "architecture"),
        (lambda folder: edit(folder, model_args={"topolgy": "er"}), "topolgy"),
        (lambda folder: edit(folder, model_args=[1]), "model_args"),
        (lambda folder: edit(folder, model_args=None), "model_args must be a dict"),
        (lambda folder: edit(folder, num_classes="four"), "num_classes must be a whole number"),
        (lambda folder: edit(folder, label_names=5), "label_names must be a list of texts"),
        (lambda folder: edit(folder, label_names="cat"), "label_names must be a list of texts"),
        (lambda folder: edit(folder, dgnet=[1]), "dgnet must be a dict"),
        (lambda folder: edit(folder, pretrained_cfg=None), "pretrained_cfg must be a dict"),
        (lambda folder: edit(folder, pretrained_cfg={"mean": "grey"}), "mean must be a list of numbers"),
        (lambda folder: edit(folder, pretrained_cfg={"input_size": [3, 32]}), "input_size must be a list of 3"),
        (lambda folder: edit(folder, pretrained_cfg={"crop_pct": "all"}), "crop_pct must be a number"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{}"), "not UTF-8"),
        (lambda folder: (folder / "config.json").write_text('{"architecture": "a", "architecture": "b"}'), "given twice"),
        (lambda folder: spoil(folder), "fc.bias holds values that are not finite"),
        (lambda folder: edit(folder, model_args={}), "size mismatch|loading state_dict"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors|No suitable"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors|header"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(change, message, tmp_path):
    save(tmp_path / "run.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    source = publish(tmp_path / "run.safetensors", tmp_path / "published").source
    change(tmp_path / "published")
    with pytest.raises(UsageError, match=message) as found:
        dgnet.create_model(source)
    assert "\n" not in str(found.value)


def spoil(folder: Path) -> None:
    """Put NaN into the weights."""
    state = load_file(folder / "model.safetensors")
    state["fc.bias"][0] = float("nan")
    save_file(state, folder / "model.safetensors")


def test_a_home_folder_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "run.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    publish(tmp_path / "run.safetensors", tmp_path / "published")
    assert dgnet.create_model("local-dir:~/published").num_classes == len(NAMES)


HUB = """
import json, sys
import dgnet, timm, torch
from dgnet.errors import UsageError
from dgnet.publishing import publish
run, name = sys.argv[1:]
source = publish(run, f"hf-hub:{name}", license="mit").source
images = torch.randn(2, 3, 32, 32)
first, second = dgnet.create_model(source).eval(), timm.create_model(source, pretrained=True).eval()
try:
    dgnet.create_model("hf-hub:user/missing")
except UsageError as error:
    missing = str(error)
print(json.dumps({"source": source, "equal": torch.equal(first(images), second(images)), "missing": missing,
    "total": float(sum(p.detach().double().sum() for p in first.parameters()))}))
"""


@pytest.mark.slow
def test_the_hub_gets_the_files_and_gives_them_back(tmp_path):
    network = save(tmp_path / "run.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    with HubStub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret"}
        words = [sys.executable, "-c", HUB, str(tmp_path / "run.safetensors"), "user/name"]
        found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    assert hub.tokens == {"Bearer secret"}
    assert 'create_model("hf-hub:user/name")' in hub.files["README.md"].decode()
    assert result["source"] == "hf-hub:user/name"
    assert result["equal"]
    assert result["total"] == pytest.approx(float(sum(p.detach().double().sum() for p in network.parameters())))
    assert "the Hub has no such model" in result["missing"]


def test_without_a_network_the_hub_is_named_in_one_line(tmp_path, capsys, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("dgnet.models._published.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    save(tmp_path / "run.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    line = refuse(capsys, "publish", tmp_path / "run.safetensors", "--to", "hf-hub:user/name")
    assert "hf-hub:user/name cannot be published" in line
    line = refuse(capsys, "evaluate", "hf-hub:user/name")
    assert "hf-hub:user/name: model.safetensors cannot be downloaded" in line


def edit(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_what_cannot_be_published_is_refused(tmp_path, capsys):
    run = tmp_path / "run.safetensors"
    save(run, "dg_resnet20", **NETWORKS["dg_resnet20"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert "holds other files (mine.txt)" in refuse(capsys, "publish", run, "--to", tmp_path / "other")
    assert "is no folder" in refuse(capsys, "publish", run, "--to", run)
    assert "--to" in refuse(capsys, "publish", run)
    assert "does not exist" in refuse(capsys, "publish", tmp_path / "missing", "--to", tmp_path / "new")
    for name in ("hf-hub:one", "hf-hub:a b/c", "hf-hub:../x/y", "hf-hub:a/b/c", "hf-hub:a/..", "hf-hub:"):
        assert "is no name of a model on the Hub" in refuse(capsys, "publish", run, "--to", name)
    (tmp_path / "figures.json").write_text('{"speed": 1}')
    line = refuse(capsys, "publish", run, "--to", tmp_path / "new", "--evaluation", tmp_path / "figures.json")
    assert "holds none of top1" in line
    assert not (tmp_path / "new").exists()
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    assert "publish a checkpoint of dgnet" in refuse(capsys, "publish", tmp_path / "bare.safetensors", "--to", tmp_path / "new")
    for name in ("hf-hub:a/b/c", "hf-hub:a b/c"):
        assert "is no name of a model on the Hub" in refuse(capsys, "evaluate", name)
