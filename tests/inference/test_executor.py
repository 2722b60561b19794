"""Which executor runs the sparse mode."""

from __future__ import annotations

import pytest
import torch

import dgnet
from dgnet.errors import UsageError
from dgnet.evaluation import evaluate
from dgnet.inference import EXECUTORS, set_sparse
from dgnet.inference import _native as native
from tests.helpers.data import Images
from tests.helpers.networks import close_some


@torch.no_grad()
@pytest.mark.parametrize("executor", EXECUTORS)
def test_all_executors_give_what_the_dense_mode_gives(tiny, executor):
    network = tiny(node_gate="hard", node_gate_bias=0.3)
    images = torch.randn(6, 3, 12, 10)
    close_some(network, images)
    expected = network(images)
    assert set_sparse(network, executor) is network
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def native_calls(monkeypatch) -> list[object]:
    """The networks that are given to the extension."""
    given: list[object] = []
    use_native = native.use_native
    monkeypatch.setattr(native, "use_native", lambda network: (given.append(network), use_native(network))[1])
    return given


def test_the_extension_is_what_is_recommended_on_a_cpu(tiny, monkeypatch):
    given = native_calls(monkeypatch)
    network = tiny().eval()
    assert set_sparse(network) is network
    assert given == [network]
    set_sparse(network, "plain")
    assert given == [network]


def test_evaluate_takes_the_executor_that_it_is_asked_for(tiny, monkeypatch):
    given = native_calls(monkeypatch)
    dataset = Images(torch.randn(4, 3, 12, 10), [0, 1, 2, 3])
    network = tiny(node_gate="hard")
    evaluate(network, dataset)
    evaluate(network, dataset, mode="sparse", executor="plain")
    assert given == []
    evaluate(network, dataset, mode="sparse")
    evaluate(network, dataset, mode="sparse", executor="native")
    assert given == [network, network]


def test_without_a_compiler_the_plain_one_runs_and_a_line_says_so(tiny, monkeypatch, capsys):
    def refuse() -> None:
        raise UsageError("the compiled sparse mode needs a C++ compiler: install g++, or name one in CXX")

    monkeypatch.setattr(native, "load_native", refuse)
    native._warn_once.cache_clear()
    network = tiny().eval()
    images = torch.randn(2, 3, 12, 10)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(set_sparse(network)(images), expected, rtol=1e-4, atol=1e-5)
    set_sparse(network)  # says it once
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a C++ compiler" in line
    assert "plain PyTorch" in line
    with pytest.raises(UsageError, match="needs a C"):
        set_sparse(network, "native")


def test_mistakes(tiny):
    with pytest.raises(UsageError, match="unknown --executor 'fast'; allowed: recommended, plain, native"):
        set_sparse(tiny(), "fast")
    with pytest.raises(UsageError, match="no dynamic stages"):
        set_sparse(dgnet.create_model("resnet20"))
    with pytest.raises(UsageError, match="--executor native runs on a CPU"):
        set_sparse(tiny().to("meta"), "native")
