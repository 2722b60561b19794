"""What exporters, tracers and transforms make of a dynamic network: the same output for any batch, or a refusal in one line."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence

import onnxruntime
import pytest
import timm
import torch
from timm.models import create_feature_extractor, get_graph_node_names, is_notrace_module
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import DynamicGraph, find_stages, record_connectivity, use_connectivity
from dgnet.inference import set_mode
from tests.helpers.networks import build, close_some, shake_norms, spread_routers
from tests.helpers.pairs import third

# Deprecations inside torch and timm: of TorchScript, the old ONNX exporter, and FX quantisation.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

FAMILIES = {
    "dg_resnet20": {"channels": (4, 6, 8)},
    "dg_resnet18": {},
    "dg_mobilenetv2_100": {},
    "dg_regnety_006": {},
    "dg_randwire_small": {"num_blocks": 4, "channels": 8},
}
QUICK = ("dg_resnet20",)
OPTIONS = [
    {},
    {"shortcut": "node"},
    {"router_reads": "activation"},
    {"topology": "er"},
    {"topology": "residual"},
    {"weighting": "learned"},
    {"weighting": "fixed"},
    {"node_gate": "hard"},
    {"node_gate": "hard", "weighting": "fixed", "shortcut": "node"},
]
BATCHES = (4, 1, 7)
"""The first is the batch that is traced."""


def prepare(network: nn.Module, size: int = 32) -> nn.Module:
    """Weights as after training: edges and gates close for some of the samples."""
    shake_norms(network).eval()
    stages = find_stages(network)
    for stage in stages:
        spread_routers(stage)
        if stage.node_gates is not None:
            nn.init.constant_(stage.node_gates.bias, 0.3)
    if all(stage.weighting.threshold is not None for stage in stages):
        close_some(network, torch.randn(6, 3, size, size))
    return network


Run = Callable[[Tensor], Tensor]


def old_onnx(network: nn.Module, images: Tensor) -> Run:
    file = io.BytesIO()
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(network, (images,), file, dynamo=False, dynamic_axes=axes, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def jit_trace(network: nn.Module, images: Tensor) -> Run:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, images), file)
    file.seek(0)
    return torch.jit.load(file)


def jit_freeze(network: nn.Module, images: Tensor) -> Run:
    return torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(network, images)))


def symbolic_trace(network: nn.Module, images: Tensor) -> Run:
    return torch.fx.symbolic_trace(network)


def vmap(network: nn.Module, images: Tensor) -> Run:
    return torch.func.vmap(lambda image: network(image[None])[0])


def ensemble(network: nn.Module, images: Tensor) -> Run:
    states = torch.func.stack_module_state([network, network])
    base = copy.deepcopy(network).to("meta")

    def run(images: Tensor) -> Tensor:
        def call(parameters, buffers):
            return torch.func.functional_call(base, (parameters, buffers), (images,))

        return torch.func.vmap(call)(*states)[1]

    return run


def jvp(network: nn.Module, images: Tensor) -> Run:
    return lambda images: torch.func.jvp(network, (images,), (torch.ones_like(images),))[0]


def vjp(network: nn.Module, images: Tensor) -> Run:
    return lambda images: torch.func.vjp(network, images)[0]


def dual(network: nn.Module, images: Tensor) -> Run:
    def run(images: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(network(forward_ad.make_dual(images, torch.ones_like(images)))).primal

    return run


def proxies(network: nn.Module, images: Tensor) -> Run:
    return lambda images: make_fx(network)(images)(images)


def functional(network: nn.Module, images: Tensor) -> Run:
    return lambda images: torch.func.functional_call(network, network.state_dict(), (images,))


def export(network: nn.Module, images: Tensor) -> Run:
    return torch.export.export(network, (images,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False).module()


def compile_for_all_sizes(network: nn.Module, images: Tensor) -> Run:
    torch._dynamo.reset()
    return torch.compile(network, dynamic=True, fullgraph=True, backend="eager")


TOOLS = [old_onnx, jit_trace, jit_freeze, symbolic_trace, vmap, ensemble, jvp, vjp, dual, functional]
SLOW = [proxies, export, compile_for_all_sizes]


def check(
    network: nn.Module, tool: Callable[[nn.Module, Tensor], Run], size: int = 32, batches: Sequence[int] = BATCHES
) -> None:
    run = tool(network, torch.randn(batches[0], 3, size, size))
    for batch in batches:
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            expected = network(images)
        torch.testing.assert_close(run(images).detach(), expected, rtol=1e-3, atol=1e-4)


def names(tools):
    return [tool.__name__ for tool in tools]


@pytest.mark.parametrize("tool", [*TOOLS, *(pytest.param(t, marks=pytest.mark.slow) for t in SLOW)], ids=names([*TOOLS, *SLOW]))
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_every_tool_gives_what_the_network_gives(tiny, tool, mode):
    network = prepare(tiny(layers=(2, 2, 1), node_gate="hard"), 12)
    with torch.no_grad(), record_connectivity(network) as record:
        network(torch.randn(6, 3, 12, 12))
    assert any(not ran[:, 1:-1].all() and ran[:, 1:-1].any() for ran in record.ran)
    check(set_mode(network, mode), tool, 12)


@third(tool=[old_onnx, jit_trace, vmap, jvp], options=OPTIONS)
def test_every_connectivity_is_traced(tiny, tool, options):
    check(prepare(tiny(layers=(2, 1, 1) if options.get("topology") != "er" else (3, 3, 3), **options), 12), tool, 12)


FAMILY_CASES = [
    pytest.param(name, tool, marks=[pytest.mark.slow] * (name not in QUICK and tool is not symbolic_trace))
    for name in FAMILIES
    for tool in (old_onnx, jit_trace, symbolic_trace, vmap, jvp)
]


@pytest.mark.parametrize(("name", "tool"), FAMILY_CASES)
def test_every_family_is_traced(name, tool):
    check(prepare(build(name, num_classes=10, **FAMILIES[name])), tool, batches=(2, 3))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the number of imposed matrices is a constant
def test_what_is_imposed_is_traced(tiny):
    network = prepare(tiny(layers=(1, 1, 1)), 12)
    adjacency = [stage.topology.mask.float() / 2 for stage in find_stages(network)]
    with use_connectivity(network, adjacency):
        for tool in (jit_trace, symbolic_trace, vmap):
            check(network, tool, 12)


def test_torch_jit_script_is_refused(tiny):
    with pytest.raises(UsageError, match=r"torch\.jit\.script cannot compile a dynamic stage; use torch\.jit\.trace"):
        torch.jit.script(tiny())


def test_a_stage_alone_has_no_fx_graph(tiny):
    with pytest.raises(UsageError, match=r"torch\.fx cannot trace a stage itself"):
        torch.fx.symbolic_trace(tiny().stages[0])


def test_an_fx_graph_calls_each_stage_and_trains(tiny):
    network = tiny()
    traced = torch.fx.symbolic_trace(network)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [call for call in calls if call.startswith("layer")] == ["layer1", "layer2", "layer3"]
    images = torch.randn(4, 3, 8, 8)
    traced(images).sum().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())
    with record_connectivity(traced) as record:
        traced(images)
    assert [len(matrix) for matrix in record.adjacency] == [4, 4, 4]


def test_fx_quantisation_leaves_the_stages_as_they_are(tiny):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    network = prepare(tiny(layers=(1, 1, 1)), 12)
    images = torch.randn(4, 3, 12, 12)
    prepared = prepare_fx(copy.deepcopy(network), get_default_qconfig_mapping(), (images,))
    prepared(images)
    quantised = convert_fx(prepared)
    assert len(find_stages(quantised)) == 3
    with torch.no_grad():
        expected = network(images)
        assert (quantised(images) - expected).abs().max() < 0.1 * expected.abs().max()


def test_gradients_of_each_sample(tiny):
    network = prepare(tiny(layers=(1, 1, 1)), 12)
    parameters, images = dict(network.named_parameters()), torch.randn(3, 3, 12, 12)

    def loss(parameters, image):
        return torch.func.functional_call(network, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    network(images).square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_timms_own_export_to_onnx(tiny, tmp_path):
    from timm.utils.onnx import onnx_export

    network = prepare(tiny(layers=(1, 1, 1)), 12)
    path = str(tmp_path / "network.onnx")
    onnx_export(network, path, torch.randn(2, 3, 12, 12), check_forward=True, dynamic_size=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 16, 20)
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"input0": images.numpy()})[0]), expected, rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_feature_extractors_of_fx(name):
    options = FAMILIES[name]
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    network = timm.create_model(name, **options).eval()
    wanted = network.forward_intermediates(images, intermediates_only=True)
    torch.manual_seed(1)
    extractor = timm.create_model(name, features_only=True, feature_cls="fx", **options).eval()
    for feature, expected in zip(extractor(images), wanted, strict=True):
        torch.testing.assert_close(feature, expected)
    assert len(timm.create_model(name, features_only=True, feature_cls="fx", out_indices=(1, 2), **options)(images)) == 2
    layer = network.feature_info[-1]["module"]
    assert layer in get_graph_node_names(network)[1]
    for create in (create_feature_extractor, torchvision_extractor):
        torch.testing.assert_close(create(network, {layer: "last"})(images)["last"], wanted[-1])
    assert is_notrace_module(DynamicGraph)


def test_tracing_gives_no_warning(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(prepare(tiny(layers=(1, 1, 1), node_gate="hard"), 12), torch.randn(2, 3, 12, 12))


def test_copies_in_other_threads_are_not_recorded(tiny):
    network = tiny(layers=(1, 1, 1))
    parallel = nn.DataParallel(network)
    parallel.device_ids = [0, 1]  # as on a machine with two GPUs
    with pytest.raises(UsageError, match=r"nn\.DataParallel"), record_connectivity(parallel):
        pass
    with pytest.raises(UsageError, match=r"nn\.DataParallel"), use_connectivity(parallel, [None] * 3):
        pass


@pytest.mark.parametrize("adjacency", [None, 5, {}, iter([])], ids=lambda value: type(value).__name__)
def test_what_is_no_list_of_matrices_is_refused(tiny, adjacency):
    with pytest.raises(UsageError, match="adjacency is a list"), dgnet.use_connectivity(tiny(), adjacency):
        pass


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda matrix: matrix.to("meta")])
def test_matrices_without_values_are_refused(tiny, change):
    network = tiny()
    matrices = [change(stage.topology.mask.float()) for stage in find_stages(network)]
    with pytest.raises(UsageError, match="a dense tensor with values"), dgnet.use_connectivity(network, matrices):
        pass
