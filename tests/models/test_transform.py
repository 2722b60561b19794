from __future__ import annotations

import pytest
import torch

import dgnet
from dgnet.graph import DynamicGraph, find_stages


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_resnet50", "dg_resnext50_32x4d"])
def test_a_scale_commutes_with_the_entry_nodes_convolution(name):
    network = dgnet.create_model(name).double()
    entry = find_stages(network)[1].nodes[0]
    assert entry.takes_scale
    channels = next(p for p in entry.parameters() if p.ndim == 4).shape[1]
    x = torch.randn(3, channels, 8, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.2, 0.7, 1.3], dtype=torch.float64, requires_grad=True)
    inputs = (x, scale, *entry.parameters())
    before, after = entry(x * scale[:, None, None, None]), entry(x, scale=scale)
    torch.testing.assert_close(after, before)
    upstream = torch.randn_like(after)
    for one, two in zip(
        torch.autograd.grad(before, inputs, upstream), torch.autograd.grad(after, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_a_convolution_that_widens_takes_no_scale():
    """RegNet's first convolution writes twice what it reads, MobileNetV2's expansion six times."""
    for name in ("dg_regnetx_006", "dg_mobilenetv2_100"):
        assert not find_stages(dgnet.create_model(name))[1].nodes[0].takes_scale


def count_kept(network: torch.nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Elements of feature maps that eager autograd keeps, by storage, and those kept more than once by value."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 4 and len(tensor) == len(images):
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(images)
    maps = [tensor for tensor in kept.values() if tensor.shape[2:] != (1, 1)]
    twice = sum(
        1 for i, one in enumerate(maps) for two in maps[:i] if one.shape == two.shape and torch.equal(one.float(), two.float())
    )
    return {"elements": sum(tensor.numel() for tensor in maps) / len(images), "twice": twice}


@pytest.mark.parametrize("autocast", [False, True])
def test_no_feature_map_is_kept_twice(autocast):
    network = dgnet.create_model("dg_resnet18", zero_init_last=False).train()
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = count_kept(network, images)
    assert kept["twice"] == 0
    # What the backward pass needs: what each convolution and each normalisation reads, and each feature once for its edges.
    needed = 0

    def count_input(module, inputs):
        nonlocal needed
        needed += inputs[0][0].numel()

    def count_output(module, inputs, output):
        nonlocal needed
        needed += output[0].numel()

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(count_input)
        elif isinstance(module, DynamicGraph):
            for node in (module.input, *module.nodes):
                node.register_forward_hook(count_output)
    network(images)
    assert kept["elements"] <= needed
