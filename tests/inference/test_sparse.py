from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import (
    DynamicGraph,
    RoutedWeighting,
    Topology,
    accept_cuts,
    find_stages,
    least_logit,
    record_connectivity,
    use_connectivity,
)
from dgnet.inference import can_skip, fold_batch_norms, set_mode, set_threshold_offset
from dgnet.inference._build import load_native
from dgnet.inference._native import NativePlan, use_native
from tests.helpers.networks import build, close_some, spread_routers
from tests.helpers.pairs import pairwise

SMALL = {
    "dg_resnet18": {},
    "dg_resnet20": {"shortcut": "node"},
    "dg_mobilenetv2_100": {},
    "dg_regnety_006": {"shortcut": "node"},
    "dg_randwire_small": {"num_blocks": 7, "channels": 8, "head_channels": 16},
    "randwire_small_er": {"num_blocks": 8, "channels": 8, "head_channels": 16, "er_p": 0.3},
}


def random_connectivity(network: nn.Module, batch: int, share: float) -> list[Tensor]:
    """Adjacency matrices in which each block is closed for some samples."""
    matrices = []
    for stage in find_stages(network):
        matrix = torch.rand(batch, *stage.topology.mask.shape) * stage.topology.mask
        matrix = matrix * (torch.rand(batch, len(stage.topology.mask), 1) < share)
        matrices.append(matrix * (torch.rand(matrix.shape) < 0.8))
    return matrices


def count_launches(network: nn.Module) -> list[tuple[DynamicGraph, int, int]]:
    """Filled while the network runs, with one (stage, node, number of samples) for each block that is launched."""
    launches: list[tuple[DynamicGraph, int, int]] = []
    for stage in find_stages(network):
        for node, block in enumerate(stage.nodes, start=1):

            def launch(module: nn.Module, inputs: tuple[Tensor, ...], stage: DynamicGraph = stage, node: int = node) -> None:
                launches.append((stage, node, len(inputs[0])))

            block.register_forward_pre_hook(launch)
    return launches


def set_python(network: nn.Module) -> nn.Module:
    return set_mode(network, "sparse")


@pytest.fixture(params=[set_python, use_native], ids=["python", "native"])
def set_sparse(request):
    """Sets a network to the sparse mode, in plain PyTorch or with the compiled extension."""
    return request.param


def check_modes_agree(
    network: nn.Module, images: Tensor, set_sparse: Callable[[nn.Module], nn.Module] = set_python
) -> list[Tensor]:
    """Both modes give the same output, connectivity and, where nothing is pruned, nodes that ran; returns the latter."""
    outputs, records = [], []
    for set_one in (lambda network: set_mode(network, "dense"), set_sparse):
        set_one(network.eval())
        with record_connectivity(network) as record:
            outputs.append(network(images))
        records.append(record)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for dense, sparse in zip(records[0].adjacency, records[1].adjacency, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)
    for dense, sparse in zip(records[0].ran, records[1].ran, strict=True):
        assert not (sparse & ~dense).any()
    return records[1].ran


@cache
def build_folded(name: str, size: int) -> nn.Module:
    return fold_batch_norms(build(name, num_classes=5, **SMALL[name]), size)


@pairwise(name=list(SMALL), batch=[1, 2, 7], share=[0.0, 0.5, 0.9, 1.0], set_sparse=[set_python, use_native])
@torch.no_grad()
def test_imposed_connectivity_gives_the_same_in_both_modes(set_sparse, name, batch, share):
    size = 32 if "20" in name else 64
    network = deepcopy(build_folded(name, size))
    with use_connectivity(network, random_connectivity(network, batch, share)):
        check_modes_agree(network, torch.randn(batch, 3, size, size), set_sparse)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shortcut": "node"},
        {"topology": "residual"},
        {"gate": "alpha", "threshold": 0.9, "learn_threshold": False},
        {"inference_weight": "raw"},
        {"router_reads": "activation"},
        {"node_gate": "gumbel", "node_gate_bias": 0.5},
        {"node_gate": "hard", "node_gate_bias": 0.0, "weighting": "fixed"},
        {"node_gate": "hard", "node_gate_bias": 0.5, "topology": "chain"},
    ],
    ids=str,
)
@torch.no_grad()
def test_blocks_run_on_the_samples_for_which_they_are_alive(tiny, set_sparse, options, batch):
    with accept_cuts():
        network = tiny(**options)
    images = torch.randn(batch, 3, 12, 10)
    if "node_gate" not in options:
        close_some(network, torch.randn(8, 3, 12, 10))
    launches = count_launches(network)
    ran = check_modes_agree(network, images, set_sparse)
    alive = {(stage, node): int(ran[s][:, node].sum()) for s, stage in enumerate(network.stages) for node in range(1, 4)}
    dense, sparse = launches[: len(alive)], launches[len(alive) :]
    assert all(samples == batch for _, _, samples in dense)
    assert {(stage, node): samples for stage, node, samples in sparse if samples} == {k: n for k, n in alive.items() if n}
    assert min(alive.values()) < batch


@torch.no_grad()
def test_where_all_weights_are_known_a_block_that_leads_nowhere_is_left_out(tiny, set_sparse):
    network = tiny().eval()
    images = torch.randn(2, 3, 12, 10)
    matrix = network.stages[0].topology.mask.float().repeat(2, 1, 1)
    matrix[0, 4, 3] = 0  # for the first image, block 3 sends to nobody ...
    matrix[:, 3, 2] = matrix[:, 4, 2] = 0  # ... and block 2 for neither
    with use_connectivity(network, [matrix, None, None]):
        ran = check_modes_agree(network, images, set_sparse)[0]
    assert ran.tolist() == [[True, True, False, False, True], [True, True, False, True, True]]


@torch.no_grad()
def test_nothing_that_a_dead_block_holds_reaches_the_output(tiny, set_sparse):
    network = set_sparse(tiny().eval())
    images = torch.randn(3, 3, 12, 10)
    matrix = network.stages[0].topology.mask.float().repeat(3, 1, 1)
    matrix[1, 2] = 0
    with use_connectivity(network, [matrix, None, None]):
        before = network(images)
        network.layer1.nodes[1].conv1.register_forward_hook(lambda *args: args[2] * float("nan"))
        after = set_sparse(network)(images)
    torch.testing.assert_close(before[1], after[1])
    assert ((after - before)[[0, 2]].abs() > 1e-4).any(1).all()


def test_a_stage_without_entry_nodes_may_be_dead_altogether(tiny, set_sparse):
    chain = Topology(torch.ones(5, 5).tril(-1).triu(-1), entry=())
    with accept_cuts():
        network = tiny(topology=[chain, "complete", "complete"], node_gate="hard", node_gate_bias=-50.0).eval()
    ran = check_modes_agree(network, torch.randn(3, 3, 12, 10), set_sparse)
    assert not ran[0][:, 1:-1].any()


def test_training_is_dense_and_modes_can_be_changed_back(tiny):
    network = set_mode(tiny(), "sparse")
    images = torch.randn(2, 3, 12, 10)
    network.train()(images).sum().backward()
    assert network.layer1.weighting.routers["0"].weight.grad is not None
    launches = count_launches(network)
    network.layer1.weighting.tau.data.fill_(2.0)
    set_mode(network, "dense").eval()(images)
    assert len(launches) == 9


@pytest.mark.parametrize("is_frozen", [False, True], ids=["whole", "frozen stem"])
def test_a_backward_pass_through_the_sparse_mode_is_refused(tiny, set_sparse, is_frozen):
    network = set_sparse(tiny().eval())
    for part in (network.conv1, network.bn1):
        part.requires_grad_(not is_frozen)
    output = network(torch.randn(2, 3, 12, 10))
    with pytest.raises(UsageError, match="the sparse mode has no gradients"):
        output.sum().backward()
    with torch.no_grad():
        assert not network(torch.randn(2, 3, 12, 10)).requires_grad
    with torch.inference_mode():
        network(torch.randn(2, 3, 12, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layers", [(1, 1, 1), (4, 3, 2)], ids=str)
@torch.no_grad()
def test_sums_agree_wherever_the_features_lie(tiny, set_sparse, layout, dtype, layers):
    network = tiny(layers=layers, node_gate="hard", node_gate_bias=0.3).to(dtype, memory_format=layout)
    images = torch.randn(8, 3, 12, 10, dtype=dtype).contiguous(memory_format=layout)
    ran = check_modes_agree(network, images, set_sparse)
    alive = torch.cat([matrix[:, 1:-1] for matrix in ran], dim=1).float().mean()
    assert 0 < alive < 1


def test_half_precision_sums_in_float32(tiny):
    network = tiny(node_gate="hard", node_gate_bias=0.3).to(torch.bfloat16).eval()
    with torch.no_grad():
        check_modes_agree(network, torch.randn(5, 3, 12, 10, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_plain_blocks_run_inside_the_extension(tiny, threads, layout):
    """One call a stage: blocks with hooks, which other tests count, are called as modules."""
    network = fold_batch_norms(tiny(layers=(4, 3, 2), channels=(16, 80, 130), node_gate="hard", node_gate_bias=0.3), (20, 18))
    use_native(network.eval())
    assert all(stage.inference_walk.runs_blocks for stage in find_stages(network))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ran = check_modes_agree(network, torch.randn(9, 3, 20, 18).contiguous(memory_format=layout), use_native)
    finally:
        torch.set_num_threads(before)
    assert not torch.cat(ran, dim=1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"topology": "ws,ws,complete", "ws_k": 2, "node_gate": "hard"},
        {"topology": "er", "er_p": 0.9, "weighting": "learned", "node_gate": "hard"},
        {"topology": "residual", "node_gate": "hard"},
        {"weighting": "learned", "learned_activation": "sigmoid", "node_gate": "hard"},
        {"gate": "alpha"},
        {"inference_weight": "raw", "node_gate": "hard"},
        {"unit_start": True, "router_norm": "layer", "node_gate": "hard"},
        {"unit_start": True, "router_start": "chain", "shortcut": "node"},
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [-0.1, 0.0, 0.1])
@torch.no_grad()
def test_the_extension_decides_as_pytorch_does(tiny, options, offset):
    with accept_cuts():
        network = fold_batch_norms(tiny(layers=(4, 3, 2), **options), (12, 10))
    for stage in find_stages(network):
        spread_routers(stage)
    set_threshold_offset(network, offset)
    images = torch.randn(6, 3, 12, 10)
    check_modes_agree(network, images, use_native)
    matrices = random_connectivity(network, 1, 0.7)  # one for all images
    with use_connectivity(network, matrices):
        check_modes_agree(network, images, use_native)


@torch.no_grad()
def test_a_gate_at_its_threshold_is_open(tiny):
    network = set_threshold_offset(tiny(node_gate="hard").eval(), 0.1)
    for stage in find_stages(network):
        for column in stage.node_gates.columns.values():
            column.weight.zero_()
        stage.node_gates.bias.fill_(least_logit(0.1))
    ran = check_modes_agree(network, torch.randn(2, 3, 12, 10), use_native)
    assert torch.cat(ran, dim=1).all()


@torch.no_grad()
def test_what_the_extension_does_not_know_runs_in_pytorch(tiny):
    class Doubled(RoutedWeighting):
        def weigh(self, node, alpha):
            return 2 * super().weigh(node, alpha)

    network = use_native(tiny(weighting=Doubled).eval())
    assert not any(isinstance(stage.inference_walk, NativePlan) for stage in find_stages(network))
    check_modes_agree(network, torch.randn(3, 3, 12, 10), use_native)
    hooked = tiny().eval()
    hooked.layer1.weighting.routers["0"].register_forward_hook(lambda module, inputs, alpha: 0.5 * alpha)
    hooked.layer2.activation.register_forward_hook(lambda module, inputs, x: 2 * x)
    check_modes_agree(hooked, torch.randn(3, 3, 12, 10), use_native)
    with torch.autocast("cpu", torch.bfloat16):
        assert use_native(tiny().eval())(torch.randn(3, 3, 12, 10)).dtype == torch.bfloat16

    class Half(nn.Sequential):
        takes_scale = False

        def forward(self, x):
            return 0.5 * super().forward(x)

    network = tiny().eval()
    network.layer1.nodes[1] = Half(*network.layer1.nodes[1])
    check_modes_agree(network, torch.randn(3, 3, 12, 10), use_native)
    network.layer1.nodes[1] = nn.AdaptiveAvgPool2d(1)
    with pytest.raises(RuntimeError, match="what node 3 sums has different shapes"):
        use_native(network)(torch.randn(3, 3, 12, 10))
    network = use_native(tiny().eval())
    check_modes_agree(deepcopy(network), torch.randn(3, 3, 12, 10))  # a copy runs in PyTorch
    images = torch.randn(3, 3, 12, 10, dtype=torch.float64)
    torch.testing.assert_close(network.double()(images), set_mode(network, "dense")(images))


def test_an_extension_that_cannot_be_built_is_a_clear_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    load_native.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"cannot be built: .*missing"):
        use_native(tiny())
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UsageError, match="cannot be built: exit status 1"):
        use_native(tiny())
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
        use_native(tiny())
    assert not list(tmp_path.iterdir())


def test_what_can_skip_and_mistakes(tiny):
    assert can_skip(tiny())
    assert can_skip(tiny(weighting="fixed", node_gate="hard"))
    assert not can_skip(tiny(weighting="learned"))
    with pytest.raises(UsageError, match="has no dynamic stages"):
        set_mode(dgnet.create_model("resnet20"), "sparse")
    with pytest.raises(UsageError, match="unknown mode 'fast'"):
        set_mode(tiny(), "fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_both_modes_agree():
    network = dgnet.create_model("dg_resnet20", node_gate="hard", node_gate_bias=0.0)
    for stage in network.stages:
        spread_routers(stage)
    check_modes_agree(network.cuda(), torch.randn(16, 3, 32, 32, device="cuda"))
