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
from dgnet.graph import record_connectivity
from tests.conftest import close_some

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
    assert all(name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in buffers)


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
    ema = ModelEmaV3(network, decay=0.5)
    ema.update(network)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), loaded, ema.module):
        assert torch.equal(copied(images), expected)


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
    outputs = [n(images) for n in (network, twin)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


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
def test_bfloat16_autocast_agrees(tiny):
    """bfloat16 keeps 8 bits: each rounding is up to 0.4 %, and about ten follow one another here."""
    network = tiny()
    images = torch.randn(4, 3, 12, 10)
    network.eval()
    expected = network(images)
    with torch.autocast("cpu", torch.bfloat16), record_connectivity(network) as record:
        output = network(images)
    assert record.alpha[0].dtype == torch.float32
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.slow
def test_compiles_as_one_graph_and_recompiles_at_most_once_a_batch_size(tiny):
    network = tiny(layers=(2, 1, 1))
    twin = copy.deepcopy(network)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for training in (True, False):
        network.train(training)
        twin.train(training)
        counter.clear()
        for batch, most in ((8, 1), (8, 1), (5, 2), (1, 3), (7, 3), (1, 3)):
            if training and batch == 1:
                continue
            images = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(compiled(images), twin(images), rtol=1e-4, atol=1e-5)
            assert counter.frame_count <= most
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compilers_own_backend_gives_the_same_step(tiny):
    network = tiny(layers=(1, 2, 1)).stages[1]
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True)
    images = torch.randn(4, 4, 8, 8)
    for run in (compiled, twin):
        run(images).square().sum().backward()
    for (name, parameter), other in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other[1].grad, rtol=1e-3, atol=1e-3, msg=name)
    torch._dynamo.reset()


def test_recording_and_imposing_work_on_a_compiled_network(tiny):
    network = tiny(layers=(1, 1, 1)).eval()
    images = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        expected = compiled(images)
        with record_connectivity(compiled) as record:
            compiled(images)
        assert len(record.adjacency[0]) == 2
        with dgnet.use_connectivity(compiled, record.adjacency):
            torch.testing.assert_close(compiled(images), expected)
    torch._dynamo.reset()
