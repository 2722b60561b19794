"""What a network goes through in other people's training code."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch._dynamo.testing import CompileCounterWithBackend

import dgnet
from dgnet.graph import record_connectivity, use_connectivity
from tests.helpers.networks import close_some

WEIGHTINGS = ["routed", "learned", "fixed"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shortcut", ["edge", "node"])
@pytest.mark.parametrize("topology", ["complete", "residual", "chain"])
def test_every_parameter_gets_a_finite_gradient(tiny, weighting, shortcut, topology):
    network = tiny(weighting=weighting, shortcut=shortcut, topology=topology)
    network(torch.randn(4, 3, 12, 12)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_state_never_depends_on_the_batch(tiny):
    network = tiny().eval()
    before = {name: value.shape for name, value in network.state_dict().items()}
    buffers = {name for name, _ in network.named_buffers()}
    with record_connectivity(network):
        for batch in (2, 5):
            network(torch.randn(batch, 3, 8, 8))
            assert {name: value.shape for name, value in network.state_dict().items()} == before
            assert {name for name, _ in network.named_buffers()} == buffers
    assert all(name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked", "mask") for name in buffers)


def test_copies_give_the_same(tiny):
    network = tiny()
    images = torch.randn(3, 3, 8, 8)
    network(images).sum().backward()
    network.eval()
    expected = network(images)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = tiny().eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), loaded):
        assert torch.equal(copied(images), expected)


@torch.no_grad()
def test_an_average_of_weights_is_one_of_routers_and_thresholds_too(tiny):
    network = tiny().eval()
    images = torch.randn(3, 3, 8, 8)
    with record_connectivity(network):
        network(images)
        ema = ModelEmaV3(network, decay=0.75)
        start = copy.deepcopy(network)
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
        network(images[:2])  # another batch size: nothing of a batch is averaged
        ema.update(network)
    for (name, average), before, now in zip(
        ema.module.named_parameters(), start.parameters(), network.parameters(), strict=True
    ):
        torch.testing.assert_close(average, 0.75 * before + 0.25 * now, msg=name)
    start.load_state_dict(ema.module.state_dict())
    assert torch.equal(ema.module(images), start(images))


def test_two_forwards_before_one_backward(tiny):
    network = tiny().eval()
    first, second = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)
    gradients = []
    for images in (first, second):
        network.zero_grad()
        network(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    network.zero_grad()
    a, b = network(first), network(second)
    (a.square().sum() + b.square().sum()).backward(retain_graph=True)
    for parameter, one, two in zip(network.parameters(), *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, one + two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["edge", "node"])
def test_gradient_checkpointing_changes_nothing(tiny, shortcut):
    network = tiny(shortcut=shortcut)
    twin = copy.deepcopy(network)
    twin.set_grad_checkpointing()
    images = torch.randn(4, 3, 8, 8)
    runs: dict[int, int] = {0: 0, 1: 0}
    for index, n in enumerate((network, twin)):

        def count(module, inputs, output, index=index):
            runs[index] += 1

        for stage in n.stages:
            for node in stage.nodes:
                node[0].register_forward_hook(count)  # recomputation may stop before the end of a node
    outputs = [n(images) for n in (network, twin)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward(retain_graph=True)
    assert runs == {0: 9, 1: 18}  # each node once more
    for output in outputs:
        output.sum().backward()
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    for (name, buffer), other in zip(network.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0, msg=name)  # statistics count a batch once


@torch.no_grad()
def test_channels_last_agrees(tiny):
    network = tiny()
    images = torch.randn(4, 3, 12, 10)
    close_some(network, images)
    expected = network(images)
    network.to(memory_format=torch.channels_last)
    output = network(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)  # the order of summation differs


@torch.no_grad()
@pytest.mark.parametrize("is_cast", [False, True], ids=["autocast", "cast"])
def test_bfloat16_agrees(tiny, is_cast):
    """bfloat16 keeps 8 bits: each rounding is up to 0.4 %, and about ten follow one another here."""
    network = tiny()
    images = torch.randn(4, 3, 12, 10)
    close_some(network, images)
    with record_connectivity(network) as record:
        expected = network(images)
    closed = [(matrix == 0)[:, stage.topology.mask] for matrix, stage in zip(record.adjacency, network.stages, strict=True)]
    assert torch.cat(closed, dim=1).any()
    dtypes = set()
    for stage in network.stages:
        for router in stage.weighting.routers.values():
            router.register_forward_hook(lambda module, inputs, output: dtypes.update({inputs[0].dtype, output.dtype}))
    network = network.bfloat16() if is_cast else network
    images = images.bfloat16() if is_cast else images
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_cast):
        network(images)
        with use_connectivity(network, record.adjacency):  # a rounding of x may move α over a hard threshold
            output = network(images)
    assert dtypes == {torch.float32}
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.slow
def test_compiles_as_one_graph_and_recompiles_at_most_once_a_batch_size(tiny):
    network = tiny(layers=(2, 1, 1))
    close_some(network, torch.randn(8, 3, 8, 8))
    twin = copy.deepcopy(network)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for training in (True, False):
        network.train(training)
        twin.train(training)
        counter.clear()
        for batch, most in ((8, 1), (8, 1), (5, 2), (1, 3), (7, 3), (1, 3)):
            images = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(compiled(images), twin(images), rtol=1e-4, atol=1e-5)
            assert counter.frame_count <= most
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compilers_own_backend_gives_the_same_step(tiny):
    # Not 4 channels: on CPUs with AVX2 only, oneDNN gets the weight gradient of a 4-channel 1×1 convolution with stride 2 in
    # channels_last wrong (torch 2.14.1; seen without this project's code).
    network = tiny(layers=(1, 2, 1), channels=(8, 16, 16)).stages[1]
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True)
    images = torch.randn(4, 8, 8, 8)
    for run in (compiled, twin):
        run(images).square().sum().backward()
    for (name, parameter), other in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other[1].grad, rtol=1e-3, atol=1e-3, msg=name)
    torch._dynamo.reset()


@pytest.mark.slow
def test_recording_and_imposing_work_on_a_compiled_network(tiny):
    network = tiny(layers=(1, 1, 1))
    images = torch.randn(2, 3, 8, 8)
    close_some(network, images)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = compiled(images)
        with record_connectivity(compiled) as record:
            compiled(images)
        with record_connectivity(network) as plain:
            network(images)
        for matrix, expected_matrix in zip(record.adjacency, plain.adjacency, strict=True):
            torch.testing.assert_close(matrix, expected_matrix)
        with dgnet.use_connectivity(compiled, record.adjacency):
            torch.testing.assert_close(compiled(images), expected)
    torch._dynamo.reset()
