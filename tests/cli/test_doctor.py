"""`dgnet doctor`: versions, devices, extras, and which forms of aggregation and of the sparse mode are used and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dgnet
from dgnet import _doctor, _extras
from dgnet.errors import UsageError
from dgnet.graph import AggregationForm
from dgnet.inference import _native, find_executor, set_sparse
from tests.helpers.command import ask, refuse


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(_native, "load_native", lambda: Path("/cache/dgnet-0.so"))
    monkeypatch.setattr(_doctor, "find_aggregation", lambda device: AggregationForm("native", f"/cache/{device}-0.so"))


@pytest.fixture
def without_compiler(monkeypatch):
    def refuse_to_build():
        raise UsageError("the compiled sparse mode needs a C++ compiler")

    monkeypatch.setattr(_native, "load_native", refuse_to_build)


def test_the_document(built, capsys):
    found = json.loads(ask(capsys, "doctor", "--device", "cpu", "--json"))
    assert found["versions"]["dgnet"] == dgnet.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "torchvision", "timm"} <= set(found["versions"])
    assert found["folder"] == str(Path(dgnet.__file__).parent)
    assert found["device"] == "cpu"
    assert "cpu" in found["devices"]
    assert found["aggregation"] == {"name": "native", "reason": "/cache/cpu-0.so", "is_failure": False}
    assert found["sparse_mode"] == {"name": "native", "reason": "/cache/dgnet-0.so"}
    assert set(found["missing"]) == set(_extras.EXTRAS)


def test_the_lines(built, capsys):
    lines = ask(capsys, "doctor", "--device", "cpu").splitlines()
    assert lines[0].startswith(f"dgnet {dgnet.__version__} (")
    assert "aggregation outside torch.compile: compiled extension: /cache/cpu-0.so" in lines
    assert "sparse mode: compiled extension: /cache/dgnet-0.so" in lines


def test_without_a_compiler_the_reason_is_given(without_compiler, capsys):
    text = ask(capsys, "doctor", "--device", "cpu")
    assert "sparse mode: plain PyTorch, which is slower on a CPU: the compiled sparse mode needs a C++ compiler\n" in text


def test_what_is_missing_is_named_with_its_command(built, capsys, monkeypatch):
    monkeypatch.setitem(_extras.EXTRAS, "explore", ("no_such_package",))
    lines = ask(capsys, "doctor", "--device", "cpu").splitlines()
    assert "extra explore is not installed (no_such_package): pip install 'dgnet[explore]'" in lines
    assert "explore" not in next(line for line in lines if line.startswith("extras: "))


def test_what_doctor_says_is_what_is_used(tiny, without_compiler, capsys):
    _native._warn_once.cache_clear()
    set_sparse(tiny(weighting="routed"))
    assert capsys.readouterr().err == f"{find_executor('cpu').reason}; the sparse mode runs in plain PyTorch, which is slower\n"
    assert find_executor("cpu").name == "plain"


def test_other_devices_use_plain_pytorch(built):
    assert find_executor("cuda").name == "plain"
    assert "on a CPU only" in find_executor("cuda").reason


def test_mistakes(capsys):
    assert "--device 'tpu' is not on this machine" in refuse(capsys, "doctor", "--device", "tpu")
    assert "unknown option --jsn" in refuse(capsys, "doctor", "--jsn")
