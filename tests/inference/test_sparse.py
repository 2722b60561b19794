from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import DynamicGraph, find_stages, record_connectivity, use_connectivity
from dgnet.inference import can_skip, fold_batch_norms, set_mode
from dgnet.inference.sparse import _Held
from tests.conftest import close_some, spread_routers

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


def check_modes_agree(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Both modes give the same output, connectivity and, where nothing is pruned, nodes that ran; returns the latter."""
    network.eval()
    outputs, records = [], []
    for mode in ("dense", "sparse"):
        set_mode(network, mode)
        with record_connectivity(network) as record:
            outputs.append(network(images))
        records.append(record)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for dense, sparse in zip(records[0].adjacency, records[1].adjacency, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)
    for dense, sparse in zip(records[0].ran, records[1].ran, strict=True):
        assert not (sparse & ~dense).any()
    return records[1].ran


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("name", list(SMALL))
@torch.no_grad()
def test_imposed_connectivity_gives_the_same_in_both_modes(name, batch, share):
    size = 32 if "20" in name else 64
    network = fold_batch_norms(dgnet.create_model(name, num_classes=5, **SMALL[name]), size)
    with use_connectivity(network, random_connectivity(network, batch, share)):
        check_modes_agree(network, torch.randn(batch, 3, size, size))


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shortcut": "node"},
        {"topology": "residual"},
        {"router_reads": "activation"},
        {"node_gate": "gumbel", "node_gate_bias": 0.5},
        {"node_gate": "hard", "node_gate_bias": 0.0, "weighting": "fixed"},
        {"node_gate": "hard", "node_gate_bias": 0.5, "topology": "chain"},
    ],
    ids=str,
)
@torch.no_grad()
def test_blocks_run_on_the_samples_for_which_they_are_alive(tiny, options, batch):
    network = tiny(**options)
    images = torch.randn(batch, 3, 12, 10)
    if "node_gate" not in options:
        close_some(network, torch.randn(8, 3, 12, 10))
    launches = count_launches(network)
    ran = check_modes_agree(network, images)
    alive = {(stage, node): int(ran[s][:, node].sum()) for s, stage in enumerate(network.stages) for node in range(1, 4)}
    dense, sparse = launches[: len(alive)], launches[len(alive) :]
    assert all(samples == batch for _, _, samples in dense)
    assert {(stage, node): samples for stage, node, samples in sparse if samples} == {k: n for k, n in alive.items() if n}
    assert min(alive.values()) < batch


@torch.no_grad()
def test_where_all_weights_are_known_a_block_that_leads_nowhere_is_left_out(tiny):
    network = tiny().eval()
    images = torch.randn(2, 3, 12, 10)
    matrix = network.stages[0].topology.mask.float().repeat(2, 1, 1)
    matrix[0, 4, 3] = 0  # for the first image, block 3 sends to nobody ...
    matrix[:, 3, 2] = matrix[:, 4, 2] = 0  # ... and block 2 for neither
    with use_connectivity(network, [matrix, None, None]):
        ran = check_modes_agree(network, images)[0]
    assert ran.tolist() == [[True, True, False, False, True], [True, True, False, True, True]]


@torch.no_grad()
def test_nothing_that_a_dead_block_holds_reaches_the_output(tiny):
    network = set_mode(tiny().eval(), "sparse")
    images = torch.randn(3, 3, 12, 10)
    matrix = network.stages[0].topology.mask.float().repeat(3, 1, 1)
    matrix[1, 2] = 0
    with use_connectivity(network, [matrix, None, None]):
        before = network(images)
        network.layer1.nodes[1].conv1.register_forward_hook(lambda *args: args[2] * float("nan"))
        after = network(images)
    torch.testing.assert_close(before[1], after[1])
    assert ((after - before)[[0, 2]].abs() > 1e-4).any(1).all()


def test_training_is_dense_and_modes_can_be_changed_back(tiny):
    network = set_mode(tiny(), "sparse")
    images = torch.randn(2, 3, 12, 10)
    network.train()(images).sum().backward()
    assert network.layer1.weighting.routers["0"].weight.grad is not None
    launches = count_launches(network)
    network.layer1.weighting.tau.data.fill_(2.0)
    set_mode(network, "dense").eval()(images)
    assert len(launches) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("limits", [(0, 1), (2**20, 1), (2**20, 9)], ids=["maps too large", "table", "too few samples"])
@pytest.mark.parametrize("layers", [(1, 1, 1), (4, 3, 2)], ids=str)
@torch.no_grad()
def test_sums_agree_wherever_they_read_the_features(tiny, limits, layout, dtype, layers):
    network = tiny(layers=layers, node_gate="hard", node_gate_bias=0.3).to(dtype, memory_format=layout)
    images = torch.randn(8, 3, 12, 10, dtype=dtype).contiguous(memory_format=layout)
    with mock.patch.multiple("dgnet.inference.sparse", _TABLE_ELEMENTS=limits[0], _TABLE_BATCH=limits[1]):
        ran = check_modes_agree(network, images)
    alive = torch.cat([matrix[:, 1:-1] for matrix in ran], dim=1).float().mean()
    assert 0 < alive < 1


@torch.no_grad()
def test_one_call_sums_the_open_edges_of_all_samples(tiny):
    topology = tiny().layer1.topology
    first, second, third = torch.randn(4, 2, 4, 5), torch.randn(2, 2, 4, 5), torch.randn(1, 2, 4, 5)
    held = _Held(topology, first)
    sent = [held.put(0, first, None), held.put(1, second, torch.tensor([1, 3])), held.put(2, third, torch.tensor([3]))]
    weights = torch.randn(4, 3)
    is_open = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]) > 0
    sums = [
        first[0] * weights[0, 0],
        first[1] * weights[1, 0] + second[0] * weights[1, 1],
        torch.zeros(2, 4, 5),
        second[1] * weights[3, 1] + third[0] * weights[3, 2],
    ]
    held.table[3] = float("nan")  # an image whose every edge from there is closed
    torch.testing.assert_close(held.sum(3, sent, weights, is_open, None), torch.stack(sums))
    torch.testing.assert_close(held.sum(3, sent, weights, is_open, torch.tensor([1, 3])), torch.stack(sums[1::2]))
    doubled = held.sum(1, sent[:1], torch.full((4, 1), 2.0), None, torch.tensor([0, 2]))
    torch.testing.assert_close(doubled, 2 * first[[0, 2]])


def test_half_precision_sums_in_float32(tiny):
    network = tiny(node_gate="hard", node_gate_bias=0.3).to(torch.bfloat16).eval()
    with torch.no_grad():
        check_modes_agree(network, torch.randn(5, 3, 12, 10, dtype=torch.bfloat16))


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
