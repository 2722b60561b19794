"""Code of the user's own on the command line: what is typed is run, what a file names only if its package is trusted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm

from dgnet.checkpoint import load_checkpoint, read_tensors
from tests.helpers.command import QUICK, ask, refuse
from tests.helpers.data import write_folder
from tests.helpers.own_code import HALVES

PACKAGE = (
    HALVES
    + """

class Hidden(nn.Module):
    def __init__(self, channels, num_edges):
        super().__init__()
        self.layer = nn.Linear(channels, num_edges)

    def forward(self, pooled):
        return self.layer(pooled).sigmoid()


def every_second(num_nodes):
    nodes = torch.arange(num_nodes)
    distance = nodes[:, None] - nodes
    return (distance == 1) | (distance == 2)


class NoWeighting:
    pass


class NeedsDecay(Weighting):
    def __init__(self, topology, channels, decay):
        super().__init__(topology, channels)


class PredictsNothing(Weighting):
    pass


class PredictsOtherwise(Weighting):
    def predict(self, feature):
        return feature.mean((2, 3))


class OneArgument(nn.Module):
    def __init__(self, channels):
        super().__init__()


def no_weighting(topology, channels):
    return 5


def no_arguments():
    return None


NUMBER = 5
"""
)
REGISTERS = """
from timm.models import register_model

from dgnet.models.cifar_resnet import dg_resnet20


@register_model
def NAME(pretrained=False, **kwargs):
    return dg_resnet20(pretrained, **kwargs)
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """The name of a package that only this test has."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return name


@pytest.fixture
def data(tmp_path) -> list[object]:
    """Options of `dgnet train`: two classes of dark images."""
    write_folder(tmp_path / "data", {"ant": 4, "cat": 4})
    return ["--data", tmp_path / "data", "--val-data", tmp_path / "data", "--epochs", 1, *QUICK]


@pytest.mark.parametrize(
    "options",
    [
        ["--weighting", "{}.Halves"],
        ["--topology", "{}.every_second"],
        ["--model-kwargs.router", "{}.Hidden"],
    ],
    ids=lambda options: options[0],
)
def test_a_class_that_is_typed_is_trained_and_evaluated(options, package, data, tmp_path, capsys):
    words = [word.format(package) for word in options]
    printed = ask(capsys, "train", *data, *words, "--output", tmp_path / "run")
    if "--topology" in options:  # its edges are stored: no code is needed
        assert "--trust-code" not in printed
        assert ask(capsys, "evaluate", tmp_path / "run")
        return
    assert f"dgnet evaluate {tmp_path}/run --trust-code {package}" in printed
    line = refuse(capsys, "evaluate", tmp_path / "run")
    assert f"which is run only if you trust it: --trust-code {package}" in line
    assert ask(capsys, "evaluate", tmp_path / "run", "--trust-code", package)
    assert load_checkpoint(tmp_path / "run").model_kwargs[words[0].rpartition(".")[2].strip("-")] == words[1]


def test_a_recipe_cannot_make_code_trusted(package, data, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    for text, what in ((f"weighting: {package}.Halves", "weighting is code"), (f"imports: {package}", "--import is code")):
        recipe.write_text(text)
        line = refuse(capsys, "train", "--config", recipe, *data, "--output", tmp_path / "run")
        assert what in line
        assert f"which is run only if you trust it: --import {package}" in line
        assert package not in sys.modules
        assert not (tmp_path / "run").exists()
    recipe.write_text(f"import: {package}")  # a keyword of Python
    assert "unknown option 'import'; in a recipe it is imports" in refuse(capsys, "train", "--config", recipe)
    recipe.write_text(f"weighting: {package}.Halves")
    ask(capsys, "train", "--config", recipe, *data, "--import", package, "--output", tmp_path / "run")
    # A standing choice of the user, for all commands.
    monkeypatch.setenv("DGNET_TRUST_CODE", f"other,{package}")
    assert ask(capsys, "evaluate", tmp_path / "run")


def test_a_network_that_a_package_registers(package, data, tmp_path, capsys):
    name = f"{package}_net"
    (tmp_path / "packages" / f"{name}.py").write_text(REGISTERS.replace("NAME", name))
    ask(capsys, "train", *data, "--import", name, "--model", name, "--output", tmp_path / "run")
    assert read_tensors(tmp_path / "run" / "checkpoints" / "last.ckpt")[1]["imports"] == [name]
    assert f"--trust-code {name}" in refuse(capsys, "evaluate", tmp_path / "run")
    source = tmp_path / "published"
    ask(capsys, "publish", tmp_path / "run", "--to", source, "--trust-code", name)
    assert json.loads((source / "config.json").read_text())["dgnet"]["imports"] == [name]
    assert f"its network is code of the package {name}" in refuse(capsys, "evaluate", f"local-dir:{source}")
    (tmp_path / "packages" / f"{name}.py").unlink()
    del sys.modules[name]
    line = refuse(capsys, "evaluate", tmp_path / "run", "--trust-code", name)
    assert f"{name} cannot be imported: there is no such module; install it, or add its folder to PYTHONPATH" in line
    assert timm.is_model(name)


def test_an_import_without_effect_on_the_network_is_not_asked_for(package, data, tmp_path, capsys):
    ask(capsys, "train", *data, "--import", package, "--output", tmp_path / "run")
    assert f"imports: {package}" in (tmp_path / "run" / "config.yaml").read_text()
    assert ask(capsys, "evaluate", tmp_path / "run")
    # The run itself would import it again.
    (tmp_path / "run" / "metrics.csv").unlink()
    assert f"only if you trust it: --import {package}" in refuse(capsys, "train", "--resume", tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "path", "expected"),
    [
        ("weighting", "Nothing", "weighting: PACKAGE has no Nothing"),
        ("weighting", "sub.Halves", "weighting: PACKAGE.sub cannot be imported: there is no such module"),
        ("weighting", "NoWeighting", "weighting PACKAGE.NoWeighting is no dgnet.graph.Weighting; derive the class from it"),
        ("weighting", "NeedsDecay", "must take (topology, channels), and takes (topology, channels, decay)"),
        ("weighting", "PredictsNothing", "has no method predict, which reads_features = True needs"),
        ("weighting", "PredictsOtherwise", "PredictsOtherwise: predict must take (node, feature), and takes (feature)"),
        ("weighting", "no_weighting", "weighting PACKAGE.no_weighting gives int, which is no dgnet.graph.Weighting"),
        ("weighting", "NUMBER", "or a callable (topology, channels) -> Weighting, got 5"),
        ("topology", "no_arguments", "topology PACKAGE.no_arguments must take (num_nodes), and takes ()"),
        ("router", "OneArgument", "router PACKAGE.OneArgument must take (channels, num_edges), and takes (channels)"),
        ("router", "NoWeighting", "router PACKAGE.NoWeighting is no torch.nn.Module; derive the class from it"),
        ("router", "NUMBER", "router must be a class or callable, got 5"),
    ],
)
def test_code_that_does_not_fit_ends_in_one_line(option, path, expected, package, data, tmp_path, capsys):
    name = f"--model-kwargs.{option}" if option == "router" else f"--{option}"
    line = refuse(capsys, "train", *data, name, f"{package}.{path}", "--output", tmp_path / "run")
    assert expected.replace("PACKAGE", package) in line
    assert not Path(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a b", "--import takes packages as they are imported, separated by commas, got 'a b'"),
        ("a,", "got ''"),
        ("nowhere_at_all", "--import: nowhere_at_all cannot be imported: there is no such module"),
    ],
)
def test_what_is_no_package_is_refused(value, expected, capsys, tmp_path):
    assert expected in refuse(capsys, "train", "--import", value, "--output", tmp_path / "run")
