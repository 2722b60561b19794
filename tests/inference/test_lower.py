"""Blocks as operations of the compiled extension: each gives what its module gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, LayerNorm2d, LayerScale2d, SqueezeExcite
from torch import nn

from dgnet.inference._build import load_native
from dgnet.inference._lower import find_operations, lower
from dgnet.inference._native import NativeForward


@pytest.fixture(autouse=True, scope="module")
def _extension():
    load_native()


class Steps(nn.Module):
    """A block whose forward pass is a function."""

    def __init__(self, forward, *parts):
        super().__init__()
        self.parts, self.steps = nn.ModuleList(parts), forward

    def forward(self, x):
        return self.steps(x, *self.parts)


def conv(*args, **options):
    return nn.Conv2d(*args, **options)


CONVOLUTIONS = {
    "pointwise": conv(20, 35, 1),
    "wide": conv(20, 100, 1, bias=False),
    "full": conv(20, 24, 3, padding=1),
    "strided": conv(20, 17, 3, stride=2, padding=1),
    "dilated": conv(20, 17, 3, padding=2, dilation=2),
    "oblong": conv(20, 17, (1, 5), padding=(0, 2)),
    "grouped": conv(20, 40, 3, padding=1, groups=5),
    "groups of 4": conv(20, 20, 3, padding=1, groups=5),
    "groups of 8": conv(56, 56, 3, padding=1, groups=7, stride=2),
    "depthwise": conv(20, 20, 3, padding=1, groups=20),
    "depthwise of 5": conv(20, 20, 5, padding=2, groups=20),
    "depthwise of 7": conv(20, 20, 7, padding=3, groups=20, stride=2),
    "depthwise, dilated": conv(20, 20, 3, padding=2, groups=20, dilation=2),
    "depthwise, no padding": conv(20, 20, 4, groups=20, stride=3),
    "same": Conv2dSame(20, 24, 3, stride=2),
    "same, depthwise": Conv2dSame(20, 20, 5, stride=2, groups=20),
    "torch's same": conv(20, 24, 5, padding="same"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("size", [(9, 13), (4, 4), (17, 34)])
@pytest.mark.parametrize("samples", [1, 3])
def test_convolutions(name, size, samples):
    x = torch.randn(samples, CONVOLUTIONS[name].in_channels, *size)
    torch.testing.assert_close(lower(CONVOLUTIONS[name]).run(x), CONVOLUTIONS[name](x), rtol=1e-5, atol=1e-5)


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 0.7),
    nn.LeakyReLU(0.2),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.Tanh(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Identity(),
]


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation):
    x = torch.cat([torch.randn(2, 7, 5, 3), torch.linspace(-100, 100, 2 * 7 * 5 * 3).view(2, 7, 5, 3)])
    torch.testing.assert_close(lower(activation).run(x), activation(x), rtol=1e-5, atol=2e-6)
    after = nn.Sequential(nn.Conv2d(7, 9, 1), activation)
    assert len(find_operations(after)) == 1  # a part of the convolution
    torch.testing.assert_close(lower(after).run(x), after(x), rtol=1e-5, atol=1e-5)


def norm(channels):
    made = BatchNormAct2d(channels, act_layer=nn.SiLU)
    nn.init.uniform_(made.running_mean)
    nn.init.uniform_(made.running_var, 0.5, 1.5)
    nn.init.normal_(made.bias)
    return made.eval()


# Of each block: the steps, and the number of operations that they become.
BLOCKS = {
    "a normalisation after a convolution": (Steps(lambda x, f, n: n(f(x)), conv(6, 9, 1), norm(9)), 1),
    "a normalisation before a convolution": (Steps(lambda x, n, f: f(n(x)), norm(6), conv(6, 9, 3)), 2),
    "a sum before an activation": (Steps(lambda x, f: F.relu(f(x) + x), conv(6, 6, 3, padding=1)), 1),
    "a sum after an activation": (Steps(lambda x, f: x + F.relu(f(x)), conv(6, 6, 1)), 2),
    "a difference": (Steps(lambda x, f: F.relu(x + f(x)) - x, conv(6, 6, 1)), 1),
    "a shortcut that cancels": (Steps(lambda x, f: (f(x) + x) - x, conv(6, 6, 1)), 1),
    "a shortcut that cancels, first": (Steps(lambda x, f: (x + f(x).relu()) - x, conv(6, 6, 1)), 1),
    "two readers": (Steps(lambda x, f, g: g(f(x)) + f(x).relu(), conv(6, 6, 1), conv(6, 6, 1)), 3),
    "squeeze and excitation": (Steps(lambda x, f, s: s(f(x)), conv(6, 40, 1), SqueezeExcite(40).eval()), 5),
    "a layer normalisation of maps": (Steps(lambda x, n, f: f(n(x)), LayerNorm2d(6), conv(6, 4, 1)), 2),
    "a layer scale": (Steps(lambda x, f, s: s(f(x)), conv(6, 40, 1), LayerScale2d(40, 0.3)), 1),
    "channels last inside": (
        Steps(
            lambda x, n, f, g: g(F.gelu(f(n(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
            nn.LayerNorm(6),
            nn.Linear(6, 40),
            nn.Linear(40, 6, bias=False),
        ),
        3,
    ),
    "nothing": (Steps(lambda x: x), 0),
    "an addition in place": (Steps(lambda x, f: F.relu(f(x).add_(x)), conv(6, 6, 1)), 1),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("samples", [1, 5])
def test_blocks(name, samples):
    block, count = BLOCKS[name]
    assert len(find_operations(block)) == count
    x = torch.randn(samples, 6, 8, 7)
    torch.testing.assert_close(lower(block).run(x), block(x.clone()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_block_whose_feature_has_channels_last():
    block = Steps(lambda x, n, f: f(n(x)), nn.LayerNorm(6), nn.Linear(6, 40))
    x = torch.randn(3, 8, 7, 6)
    torch.testing.assert_close(lower(block, "NHWC").run(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), block(x))
    assert lower(block) is None
    assert lower(block, "NLC") is None


def overwrite(x, f):
    y = f(x)
    z = y.relu_()
    return z + y


@pytest.mark.parametrize(
    "block",
    [
        nn.MaxPool2d(2),
        nn.GroupNorm(2, 6),
        Steps(lambda x, f: f(x) if x.sum() > 0 else x, conv(6, 6, 1)),
        Steps(lambda x: x * 2),
        Steps(lambda x: x.mean((2, 3))),
        Steps(lambda x: x + x.mean((2, 3), keepdim=True)),
        Steps(overwrite, conv(6, 6, 1)),
        conv(6, 6, 3, padding=1, padding_mode="circular"),
        Steps(lambda x, f: [f(x)], conv(6, 6, 1)),
    ],
    ids=str,
)
def test_what_is_not_known_is_not_lowered(block):
    assert find_operations(block) is None


def test_a_block_with_hooks_is_not_lowered():
    block = conv(6, 6, 1)
    assert find_operations(block) is not None
    block.register_forward_hook(lambda *args: None)
    assert find_operations(block) is None


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(6, 6, 1), norm(6)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y if self.training else y.relu()


@torch.no_grad()
def test_a_block_is_lowered_as_it_is_in_evaluation():
    block, x = ByMode(), torch.randn(2, 6, 5, 5)
    program = lower(block.train())
    assert block.training
    assert block.norm.training
    torch.testing.assert_close(program.run(x), block.eval()(x))
    block.norm.train()  # statistics of the batch also in evaluation
    assert find_operations(block) is None


def test_a_block_with_a_forward_pass_of_its_own_is_not_lowered():
    block = nn.Sequential(conv(6, 6, 1))
    block[0].forward = lambda x: x
    assert find_operations(block) is None


@torch.no_grad()
def test_a_lowered_module_takes_further_arguments_in_plain_pytorch():
    block = ByMode().eval()
    block.forward = NativeForward(block, lower(block))
    block.forward.plain = lambda x, shift=0.0: x + shift
    x = torch.randn(2, 6, 5, 5)
    with torch.inference_mode():
        assert torch.equal(block(x, 1.0), x + 1)
        assert not torch.equal(block(x), x)


@torch.no_grad()
def test_samples_go_through_a_block_in_parts():
    """Large maps, so that few samples fit in the cache, on one thread and on two."""
    block = nn.Sequential(conv(8, 96, 1), nn.ReLU(), conv(96, 96, 3, padding=1, groups=96), nn.Hardswish(), conv(96, 8, 1))
    program, x = lower(block), torch.randn(7, 8, 60, 50)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.testing.assert_close(program.run(x), block(x), rtol=1e-5, atol=1e-5)
        finally:
            torch.set_num_threads(before)


def test_a_wrong_number_of_channels_is_an_error():
    with pytest.raises(RuntimeError, match="a convolution reads 6 channels, got 5"):
        lower(conv(6, 6, 1)).run(torch.randn(1, 5, 4, 4))
