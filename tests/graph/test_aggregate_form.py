"""Which kernels an aggregation runs, and those that need a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgnet.errors import UsageError
from dgnet.graph import _aggregate_form as forms
from dgnet.graph import aggregate
from tests.helpers.twins import draw_case


@pytest.fixture
def afresh():
    """No memory of which kernels were chosen."""
    for function in (forms.find_aggregation, forms.prepare):
        function.cache_clear()
    yield
    for function in (forms.find_aggregation, forms.prepare):
        function.cache_clear()


class _Unbuilt:
    """In place of the extension: it is not built yet, and cannot be."""

    def load(self) -> None:
        raise UsageError("the compiled aggregation needs a C++ compiler")

    def load_built(self) -> None:
        return None


def test_without_a_compiler_one_line_says_so(afresh, monkeypatch, capsys):
    monkeypatch.setattr(forms, "EXTENSION", _Unbuilt())
    features, weights, _ = draw_case(0, (2, 3, 4, 4), 3, torch.float32, "contiguous", "none")
    with torch.no_grad():
        aggregate(features, weights)
    aggregate(features, weights)
    assert capsys.readouterr().err == ""  # nothing is built for a pass without gradients
    for _ in range(3):
        aggregate(features, weights.requires_grad_())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("the compiled aggregation needs a C++ compiler; sums outside torch.compile run in plain PyTorch")
    assert forms.find_aggregation("cpu").name == "plain"


def test_the_switch(afresh, monkeypatch, capsys):
    monkeypatch.setattr(forms, "EXTENSION", _Unbuilt())
    monkeypatch.setenv("DGNET_AGGREGATE", "plain")
    forms.prepare("cpu", True)
    assert forms.find_aggregation("cpu") == forms.AggregationForm("plain", "DGNET_AGGREGATE=plain")
    assert capsys.readouterr().err == ""
    assert "have not been timed" in _choose("cuda", "auto", monkeypatch).reason
    assert "CPU and CUDA devices only" in _choose("mps", "auto", monkeypatch).reason
    with pytest.raises(UsageError, match="unknown DGNET_AGGREGATE 'python'; allowed: auto, plain, triton"):
        _choose("cpu", "python", monkeypatch)


def _choose(device: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> forms.AggregationForm:
    monkeypatch.setenv("DGNET_AGGREGATE", choice)
    forms.find_aggregation.cache_clear()
    return forms.find_aggregation(device)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, with this package and these tests."""
    path = os.pathsep.join(str(folder) for folder in (Path(forms.__file__).parents[2], Path(__file__).parents[2]))
    variables = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


TRAIN_PLAIN = """
import torch
from dgnet.compat.torch import has_kernel
from dgnet.graph import aggregate
features, weights = [torch.ones(2, 3, 4, 4, requires_grad=True) for _ in range(2)], torch.full((2, 2), 0.5, requires_grad=True)
for _ in range(2):
    total = aggregate(features, weights)
    grads = torch.autograd.grad(total.sum(), [weights, *features])
print(has_kernel("dgnet::aggregate", "CPU"), total.unique().item(), grads[0].unique().item(), grads[1].unique().item())
"""


@pytest.mark.slow
def test_a_process_without_a_compiler_trains(tmp_path):
    environment = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run_python(TRAIN_PLAIN, **environment)
    assert done.stdout == "False 1.0 48.0 0.5\n"
    notice, warning = done.stderr.splitlines()
    assert notice.startswith("compiling the aggregation, once on this machine")
    assert "cannot be built: No such file or directory (no-such-compiler)" in warning
    assert "run in plain PyTorch" in warning


COMPARE_TRITON = """
import itertools
import torch
from dgnet.graph._aggregate_plain import aggregate_backward_plain, aggregate_plain
from dgnet.graph._aggregate_triton import aggregate_backward_triton, aggregate_triton
from tests.helpers.twins import TOLERANCES, draw_case

NEEDED = ((True, [True] * 4), (False, [True, False, True, True]), (True, [False] * 4))
for seed, (dtype, closing) in enumerate(itertools.product(TOLERANCES, ["none", "some", "all"])):
    layout = ["contiguous", "channels_last", "strided"][(seed + seed // 3) % 3]
    # Larger than a tile, and no multiple of it.
    features, weights, is_open = draw_case(seed, (3, 6, 23, 19), 4, dtype, layout, closing)
    upstream = torch.randn(features[0].shape).to(dtype)
    if seed % 2:
        features, upstream = [feature.unflatten(1, (2, 3)) for feature in features], upstream.unflatten(1, (2, 3))
        weights = torch.stack([weights, weights + 1], 2)
    rows = torch.randint(3, (4, 3)) if closing == "none" else None
    tolerance = TOLERANCES[dtype]
    one, two = (form(features, weights, is_open, rows) for form in (aggregate_triton, aggregate_plain))
    assert one.stride() == two.stride()
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    forms = (aggregate_backward_triton, aggregate_backward_plain)
    (w1, f1), (w2, f2) = (form(upstream, features, weights, is_open, *NEEDED[seed // 2 % 3]) for form in forms)
    torch.testing.assert_close(w1, w2, rtol=max(tolerance, 1e-4), atol=max(tolerance, 1e-3))
    assert len(f1) == len(f2)
    for one, two in zip(f1, f2):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
empty = aggregate_triton([torch.ones(0, 3, 4, 4)] * 2, torch.ones(0, 2))
grads = aggregate_backward_triton(empty, [empty, empty], torch.ones(0, 2), None, True, [True, True])
print("equal", tuple(empty.shape), tuple(grads[0].shape))
"""


@pytest.mark.slow
def test_the_triton_kernels_match_the_plain_ones():
    """In Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    assert run_python(COMPARE_TRITON, TRITON_INTERPRET="1").stdout == "equal (0, 3, 4, 4) (0, 2)\n"
