"""Converted networks in every form in which networks run: sparse, compiled, exported, in low precision."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from timm.models import create_feature_extractor
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import find_stages, record_connectivity, use_connectivity
from dgnet.inference import compile_network, export_network, save_export, set_mode, set_sparse
from dgnet.inference._export import run_onnx
from tests.helpers.networks import close_some
from tests.helpers.static import NETWORKS, build_static, draw_images, largest_difference, use_gates

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

RATIO = 1.6
"""Of rounding errors that should be equal: over several draws of weights it is 0.7 to 1.3, and 1.0 on average."""
FOUR = ("resnet", "convnext", "efficientnet", "vit")


def convert_gated(name: str, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A converted network of which gates skip some blocks for some images."""
    converted = dgnet.convert(build_static(name).to(dtype), node_gate="hard", **options)
    use_gates(converted)
    return converted


@pytest.mark.parametrize("closing", ["gates", "edges", "fixed"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_sparse_is_dense_in_each_layout(name, closing):
    images = draw_images(name, 8, torch.float64)
    if closing == "edges":
        converted = dgnet.convert(build_static(name).double())
        close_some(converted, images)
    else:
        converted = convert_gated(name, torch.float64, weighting="fixed" if closing == "fixed" else "routed")
    sparse = set_mode(deepcopy(converted), "sparse")
    with record_connectivity(converted) as expected:
        output = converted(images)
    with record_connectivity(sparse) as found:
        torch.testing.assert_close(sparse(images), output, rtol=1e-9, atol=1e-9)
    for dense_ran, sparse_ran in zip(expected.ran, found.ran, strict=True):
        assert torch.equal(dense_ran, sparse_ran)
    if closing != "edges":
        assert any(not ran.all() for ran in expected.ran)
    for adjacency, other in zip(expected.adjacency, found.adjacency, strict=True):
        torch.testing.assert_close(adjacency, other)
    with use_connectivity(sparse, expected.adjacency):
        torch.testing.assert_close(sparse(images), output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sparse(images[2:3]), output[2:3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_stage_of_which_all_blocks_are_skipped_passes_its_input_on(name):
    static, images = build_static(name), draw_images(name)
    converted = dgnet.convert(static, weighting="fixed", node_gate="hard")
    for stage in find_stages(converted):
        stage.node_gates.bias.fill_(-50.0)
    shorter = deepcopy(static)
    for run in converted.conversion.stages:
        for block in run.blocks:
            shorter.set_submodule(block, _PassOn())
    torch.testing.assert_close(converted(images), shorter(images))
    torch.testing.assert_close(set_mode(converted, "sparse")(images), shorter(images))


@pytest.mark.parametrize("name", ["resnet", "swin", "eva"])
@torch.no_grad()
def test_the_executor_of_this_machine_gives_what_the_dense_form_gives(name):
    converted, images = convert_gated(name), draw_images(name, 8)
    expected = converted(images)
    assert largest_difference(set_sparse(deepcopy(converted))(images), expected) < 5e-5


QUICK = [("resnet", False)]
SLOW = [("eva", False), *((name, True) for name in (*FOUR, "swin", "eva"))]


@pytest.mark.parametrize(("name", "is_training"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_compiler_traces_it_as_one_graph(name, is_training):
    converted = convert_gated(name, torch.float64).train(is_training)
    images = draw_images(name, 4, torch.float64)
    expected = deepcopy(converted)
    torch._dynamo.reset()
    compiled = torch.compile(converted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected(images))
    if is_training:
        compiled(images).sum().backward()
        assert all(parameter.grad is not None for parameter in find_stages(converted)[0].nodes.parameters())
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "swin"])
@torch.no_grad()
def test_the_compiled_sparse_form_branches(name):
    converted, images = convert_gated(name), draw_images(name, 4)
    expected = converted(images)
    torch._dynamo.reset()
    compiled = torch.compile(set_mode(converted, "sparse"), fullgraph=True, backend="aot_eager")
    for index in range(len(images)):
        found = compiled(images[index : index + 1])
        torch.testing.assert_close(found, expected[index : index + 1], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("resnet", "dense"), ("swin", "sparse")])
@torch.no_grad()
def test_compiled_networks_give_what_the_network_gives(name, mode):
    converted, images = convert_gated(name), draw_images(name, 4)
    expected = converted(images)
    torch._dynamo.reset()
    assert largest_difference(compile_network(converted, mode)(images), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "eva"])
def test_blocks_that_torch_cannot_export_for_no_samples_are_refused(name):
    with pytest.raises(UsageError, match=r"cannot be exported in its sparse form|has blocks that torch cannot export for"):
        export_network(convert_gated(name), tuple(draw_images(name).shape[-2:]), "sparse")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("resnet", "sparse"), ("vit", "sparse"), ("swin", "dense")])
@torch.no_grad()
def test_onnx_files_give_what_the_network_gives(name, mode, tmp_path):
    converted = convert_gated(name)
    size = tuple(draw_images(name).shape[-2:])
    program = export_network(converted, size, mode)
    save_export(program, tmp_path / "network.onnx", "onnx", {"model": name})
    for batch in (1, 7):
        images = draw_images(name, batch)
        expected = converted(images)
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run_onnx(tmp_path / "network.onnx", images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", FOUR)
@torch.no_grad()
def test_low_precision_loses_no_more_than_in_the_static_network(name, is_training):
    static = build_static(name)
    converted = dgnet.convert(static, node_gate="hard")
    images = torch.randn(32, *draw_images(name).shape[1:])
    exact = deepcopy(static).train(is_training)(images)
    errors = []
    for network in (static, converted):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(float((network.train(is_training)(images).float() - exact).square().mean().sqrt()))
    assert 0 < errors[1] < RATIO * errors[0]


@pytest.mark.parametrize("name", ["resnet", "convnext"])
@torch.no_grad()
def test_fx_calls_each_stage(name):
    converted, images = convert_gated(name), draw_images(name)
    traced = torch.fx.symbolic_trace(converted)
    torch.testing.assert_close(traced(images), converted(images))
    layer = converted.feature_info[-1]["module"]
    (wanted,) = converted.forward_intermediates(images, indices=1, intermediates_only=True)
    torch.testing.assert_close(create_feature_extractor(converted, {layer: "last"})(images)["last"], wanted)


@torch.no_grad()
def test_an_argument_that_the_conversion_did_not_see_is_refused():
    converted, images = dgnet.convert(build_static("vit")), draw_images("vit")
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    with pytest.raises(UsageError, match="were called without argument 'attn_mask' in the conversion"):
        converted.forward_features(images, attn_mask=mask)


class _PassOn(nn.Module):
    def forward(self, x: torch.Tensor, *further: object, **named: object) -> torch.Tensor:
        return x
