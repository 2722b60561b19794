"""What only a GPU shows; `benchmarks/gpu.py` runs these before it measures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dgnet
from dgnet.graph import aggregate
from dgnet.inference import deploy
from dgnet.inference._compile import CudaGraphs
from tests.helpers.networks import close_some
from tests.helpers.twins import TOLERANCES, draw_case, sum_by_sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("closing", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_aggregation_matches_the_twin(dtype, layout, closing, compiled):
    torch._dynamo.reset()
    features, weights, is_open = draw_case(1, (3, 8, 5, 7), 4, dtype, layout, closing)
    form = torch.compile(aggregate, fullgraph=True) if compiled else aggregate
    on_device = [feature.cuda() for feature in features]
    output = form(on_device, weights.cuda(), None if is_open is None else is_open.cuda())
    tolerance = TOLERANCES[dtype]
    expected = sum_by_sample(features, weights, is_open)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_compiled_half_precision_step_follows_float32(dtype):
    torch._dynamo.reset()
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = dgnet.create_model("dg_resnet20").to(device, memory_format=torch.channels_last)
        run = torch.compile(network, fullgraph=True) if device == "cuda" else network
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(3):
            with torch.autocast(device, dtype, enabled=device == "cuda"):
                logits = run(images.to(device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=0.03)


@torch.inference_mode()
def test_cuda_graphs_give_what_eager_gives(tiny):
    network = tiny().cuda()
    images = torch.randn(6, 3, 12, 12, device="cuda")
    close_some(network, images)
    run = torch.compile(network, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(run(images), network(images), rtol=1e-3, atol=1e-4)


def test_a_dense_network_is_deployed_under_cuda_graphs(tiny):
    network = tiny().cuda().eval()
    batches = [torch.randn(6, 3, 12, 12, device="cuda").contiguous(memory_format=torch.channels_last) for _ in range(3)]
    run = deploy(network, (12, 12), "dense", 6, compile=True)
    assert isinstance(run, CudaGraphs)
    found = [run(images) for images in batches]
    with torch.inference_mode():
        for images, logits in zip(batches, found, strict=True):
            torch.testing.assert_close(logits, network(images), rtol=1e-3, atol=1e-3)
