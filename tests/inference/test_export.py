from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.export import Dim

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import Router, find_stages, record_connectivity
from dgnet.inference import _export as export
from dgnet.inference import export_network, set_mode
from dgnet.inference._compile import compile_graph
from dgnet.inference._export import check_export, run_onnx, save_export
from tests.helpers.networks import close_some

SIZE = (12, 8)


def gated(tiny, bias: float, **options: object) -> nn.Module:
    """A network whose gates are closed for no, some or all samples by their bias."""
    network = tiny(layers=(2, 2, 1), node_gate="hard", **options).eval()
    for stage in find_stages(network):
        with torch.no_grad():
            stage.node_gates.bias.fill_(bias)
    return network


def alive_share(network: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad(), record_connectivity(network) as record:
        network(images)
    blocks = torch.cat([ran[:, 1:-1].flatten() for ran in record.ran])
    return float(blocks.float().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("live", "mode"), [("part", "dense"), ("empty", "sparse"), ("part", "sparse"), ("full", "sparse")])
def test_exported_forms_give_what_the_network_gives_for_every_live_set(tiny, tmp_path, live, mode):
    network = gated(tiny, {"empty": -50.0, "part": 0.3, "full": 50.0}[live])
    share = alive_share(network, torch.randn(7, 3, *SIZE))
    assert {"empty": share == 0, "part": 0 < share < 1, "full": share == 1}[live]
    program = export_network(network, SIZE, mode)
    path = tmp_path / "network.onnx"
    save_export(program, path, "onnx", {"model": "tiny"})
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, *SIZE)
        with torch.no_grad():
            expected = network(images)
            torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run_onnx(path, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"shortcut": "node"}], ids=str)
def test_what_closes_by_thresholds_is_exported_too(tiny, tmp_path, options):
    network = tiny(layers=(2, 1, 1), **options)
    close_some(network, torch.randn(8, 3, *SIZE))
    assert alive_share(network, torch.randn(7, 3, *SIZE)) < 1
    program = export_network(network, SIZE, "sparse")
    save_export(program, tmp_path / "network.pt2", "torch", {"model": "tiny"})
    extra = {"dgnet": ""}
    loaded = torch.export.load(tmp_path / "network.pt2", extra_files=extra).module()
    assert json.loads(extra["dgnet"]) == {"model": "tiny"}
    images = torch.randn(5, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network(images), rtol=1e-4, atol=1e-5)
    assert check_export(tmp_path / "network.pt2", "torch", network, SIZE) < 1e-4


@pytest.mark.slow
def test_the_sparse_form_computes_a_block_on_gathered_samples_only(tiny):
    program = export_network(gated(tiny, 0.3), SIZE, "sparse")
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    sizes = {str(node.meta["val"].shape[0]) for node in convolutions}
    assert sum(size.startswith("u") for size in sizes) == 5  # one symbol for each of the five blocks
    dense = export_network(gated(tiny, 0.3), SIZE, "dense")
    assert not any("nonzero" in str(node.target) for node in dense.graph.nodes)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_router_is_exported_as_a_linear_layer(norm):
    """From the sum of products that the compiler gets, OpenVINO computes other values for several images."""
    router = Router(4, 3, bias=3.0, std=0.1, norm=norm).eval()
    program = torch.export.export(router, (torch.randn(5, 4),), dynamic_shapes=({0: Dim.DYNAMIC},))
    steps = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert steps[-2:] == [torch.ops.aten.linear.default, torch.ops.aten.sigmoid.default]


@pytest.mark.slow
def test_a_file_that_differs_is_refused(tiny, tmp_path):
    network = gated(tiny, 0.3)
    save_export(export_network(network, SIZE, "dense"), tmp_path / "network.pt2", "torch", {})
    other = copy.deepcopy(network)
    nn.init.normal_(other.fc.weight)
    with pytest.raises(UsageError, match="differs from the checkpoint"):
        check_export(tmp_path / "network.pt2", "torch", other, SIZE)


def test_a_file_that_gives_no_numbers_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "run_onnx", lambda path, images: torch.full((len(images), 10), torch.nan))
    with pytest.raises(UsageError, match="differs from the checkpoint by nan"):
        check_export(tmp_path / "network.onnx", "onnx", dgnet.create_model("resnet20"), (32, 32))


@pytest.mark.slow
def test_forms_that_cannot_be(tiny, tmp_path):
    with pytest.raises(UsageError, match="has no dynamic stages"):
        export_network(dgnet.create_model("resnet20"), 32, "sparse")
    with pytest.raises(UsageError, match="unknown --mode 'fast'"):
        export_network(tiny(), SIZE, "fast")
    program = export_network(dgnet.create_model("resnet20"), 32, "dense")
    with pytest.raises(UsageError, match="unknown --format 'tflite'"):
        save_export(program, tmp_path / "x", "tflite", {})
    with pytest.raises(UsageError, match="cannot be written"):
        save_export(program, tmp_path / "missing" / "x.onnx", "onnx", {})


@pytest.mark.slow
def test_in_a_compiled_graph_the_sparse_mode_branches(tiny):
    network = tiny(layers=(2, 1, 1), channels=(8, 8, 16), shortcut="node", node_gate="hard").eval()
    for stage in find_stages(network):
        stage.node_gates.bias.data.fill_(0.3)
    images = torch.randn(12, 3, *SIZE)
    with torch.no_grad():
        expected = network(images)
    assert alive_share(network, images) < 1
    torch._dynamo.reset()
    compiled = compile_graph(set_mode(network, "sparse"), "sparse")
    for index in range(len(images)):
        torch.testing.assert_close(compiled(images[index : index + 1]), expected[index : index + 1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_a_graph_that_inference_mode_compiled_serves_ordinary_calls_too(monkeypatch):
    """In inference mode the compiler treats no weights as constants."""
    seen = []

    def note(images: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_inference_mode_enabled(), images.is_inference()))
        return images

    monkeypatch.setattr(torch, "compile", lambda network, **options: note)
    run, images = compile_graph(nn.Identity(), "dense"), torch.ones(1, 3, 4, 4)
    with torch.inference_mode():
        run(images)
        run(images * 1)
    run(images)
    assert seen == [(False, False)] * 3
