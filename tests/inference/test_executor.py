"""Which executor runs the sparse mode."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.evaluation import evaluate
from dgnet.graph import find_stages, record_connectivity, use_connectivity
from dgnet.inference import EXECUTORS, compile_network, fold_batch_norms, set_mode, set_sparse
from dgnet.inference import _native as native
from tests.helpers.data import Images
from tests.helpers.networks import close_some, close_some_gates, shake_norms, spread_routers
from tests.helpers.pairs import slow_unless


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


# Small networks of each family, whose blocks run inside the extension.
FAMILIES = {
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "efficientnet_b0": {},
    "tf_efficientnetv2_b0": {},
    "tf_efficientnet_lite0": {},
    "regnety_002": {},
    "resnet18": {"layers": (3, 1, 1, 1)},
    "seresnet50": {"layers": (3, 1, 1, 1)},
    "convnext_atto": {"depths": (2, 3, 2, 2), "dims": (12, 24, 32, 40)},
}


def convert(name, **options):
    """A converted network with random normalisations and routers, whose gates close some blocks for some samples."""
    static = shake_norms(timm.create_model(name, num_classes=5, **FAMILIES.get(name, options)))
    for module in static.modules():
        if isinstance(gamma := getattr(module, "gamma", None), nn.Parameter):
            nn.init.uniform_(gamma, 0.5, 1.0)
    network = dgnet.convert(static.eval(), node_gate="hard", image_size=48).eval()
    for stage in find_stages(network):
        spread_routers(stage, std=0.2)
    close_some_gates(network, torch.randn(12, 3, 48, 48))
    return network


def assert_close(output, expected):
    assert (output - expected).abs().max() <= 5e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", slow_unless(("mobilenetv3_small_050", "resnet18", "convnext_atto").__contains__, FAMILIES))
def test_converted_stages_run_inside_the_extension(name):
    network = convert(name)
    images = torch.randn(7, 3, 48, 40)
    with record_connectivity(network) as dense:
        expected = network(images)
    assert_close(set_mode(network, "sparse")(images), expected)
    without_norms = fold_batch_norms(network, (48, 40))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in without_norms.modules())
    for folded in (network, without_norms):
        set_sparse(folded, "native")
        for stage in find_stages(folded):
            assert stage.inference_walk.runs_blocks
            for block in stage.nodes:  # no block is called as a module
                block.forward = None
        for layout in (torch.contiguous_format, torch.channels_last):
            with record_connectivity(folded) as record:
                assert_close(folded(images.contiguous(memory_format=layout)), expected)
            torch.testing.assert_close(record.adjacency, dense.adjacency, rtol=1e-4, atol=1e-5)
        assert_close(folded(images[2:3]), expected[2:3])
    shares = torch.cat([ran[:, 1:-1].float().mean(0) for ran in dense.ran])
    assert ((shares > 0) & (shares < 1)).any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_imposed_connectivity_reaches_converted_blocks(name):
    network = convert(name)
    images = torch.randn(4, 3, 48, 48)
    matrices = []
    for stage in find_stages(network):
        closed = torch.rand(4, len(stage.topology.mask), 1) < 0.4
        matrices.append((torch.rand(4, *stage.topology.mask.shape) * stage.topology.mask).masked_fill(closed, 0))
    with use_connectivity(network, matrices):
        expected = network(images)
        assert_close(set_sparse(network, "native")(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_what_cannot_be_lowered_runs_block_by_block(name):
    options = {
        "vit_tiny_patch16_224": {"img_size": 48, "depth": 4, "embed_dim": 24, "num_heads": 2},
        "swin_tiny_patch4_window7_224": {"img_size": 48, "embed_dim": 12, "num_heads": (1, 1, 2, 2), "window_size": 3},
        "test_resnet": {"layers": (3, 1, 1, 1), "block_args": {"attn_layer": "eca"}},
    }
    network = convert(name, **options[name])
    images = torch.randn(5, 3, 48, 48)
    expected = network(images)
    set_sparse(network, "native")
    assert any(not stage.inference_walk.runs_blocks for stage in find_stages(network))
    assert_close(network(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "convnext_atto"])
def test_as_deployed_the_static_blocks_run_in_the_extension_too(name):
    network = convert(name)
    images = torch.randn(6, 3, 48, 48)
    expected = network(images)
    run = compile_network(network, "sparse")
    assert_close(run(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(images).isfinite().all()
    assert_close(network(images), expected)
    replaced = native.lower_static_blocks(native.use_native(fold_batch_norms(network, 48)))
    lowered = [module for module in replaced.modules() if isinstance(module.forward, native.NativeForward)]
    assert any(isinstance(part, nn.Conv2d) for module in lowered for part in module.modules())
