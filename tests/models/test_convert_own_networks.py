"""Networks of the user's own, called in ways in which a stage in place of its blocks would compute something else."""

from __future__ import annotations

import random
from types import MethodType
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import find_stages
from tests.helpers.static import build_static, draw_images, largest_difference

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, *further: object) -> Tensor:
        return x + self.conv2(self.bn(self.conv1(x)).relu())


class Network(nn.Module):
    """Stem, blocks and classifier; `steps` is the forward pass between stem and classifier."""

    def __init__(self, steps, blocks: int = 3, **parts: object) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ModuleList(Block() for _ in range(blocks))
        self.head, self.steps = nn.Linear(4, 5), steps
        for name, part in parts.items():
            setattr(self, name, part)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)

    def forward(self, images: Tensor):
        x = self.steps(self, self.stem(images))
        return self.head(x.mean((2, 3))) if isinstance(x, Tensor) else x


def in_a_row(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = block(x)
    return x


def convert(network: nn.Module, **options: object) -> nn.Module:
    return dgnet.convert(network.eval(), image_size=16, **options)


# --- what stays static because the network reads or changes features between blocks


def _lists(network: Network, x: Tensor) -> list[Tensor]:
    outputs = []
    for block in network.blocks:
        x = block(x)
        outputs.append(x)
    return outputs


def _keeps(network: Network, x: Tensor) -> Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x)
        if number == 1:
            network.kept = x
    return x


def _reads_in_training(network: Network, x: Tensor) -> Tensor:
    kept = None
    for block in network.blocks:
        x = block(x)
        kept = x if kept is None else kept
    return x + kept if network.training else x


def _drops_paths(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = network.drop(block(x))
    return x


def _drops_layers(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        if not network.training or torch.rand(1) > 0.01:
            x = block(x)
    return x


def _drops_layers_in_python(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        if not network.training or random.random() > 0.5:
            x = block(x)
    return x


def _adds_in_training(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = block(x)
        if network.training:
            x += 0.5
    return x


CHANGED = "in training, a feature between it and the next block is changed or read elsewhere"


@pytest.mark.parametrize(
    ("steps", "parts", "reason"),
    [
        (_lists, {}, "it is one block only"),
        (_drops_paths, {"drop": DropPath(0.0)}, "it is one block only"),
        (_drops_paths, {"drop": DropPath(0.3)}, "it is one block only"),
        (_drops_layers, {}, "in training it is not always called"),
        (_drops_layers_in_python, {}, "in training it is not always called"),
        (_adds_in_training, {}, CHANGED),
    ],
    ids=["outputs", "a module between", "drop path", "layer drop", "layer drop in Python", "only in training"],
)
def test_blocks_between_which_something_happens_stay_static(steps, parts, reason):
    with pytest.raises(UsageError, match=f"has no run of blocks .*{reason}"):
        convert(Network(steps, **parts))


@pytest.mark.parametrize(("steps", "first"), [(_keeps, "blocks.2"), (_reads_in_training, "blocks.1")])
@torch.no_grad()
def test_a_feature_that_is_kept_or_read_in_training_ends_a_run(steps, first):
    static = Network(steps, blocks=5).eval()
    converted = convert(static)
    assert [run.name for run in converted.conversion.stages if len(run.blocks) > 1][-1] == first
    for is_training in (False, True):
        expected, found = (network.train(is_training)(IMAGES) for network in (static, converted))
        torch.testing.assert_close(found, expected)
    if steps is _keeps:
        torch.testing.assert_close(converted.kept, static.kept)


def test_random_numbers_and_the_modes_of_modules_stay_as_they_are():
    static = Network(in_a_row).train()
    static.blocks[0].bn.eval()
    modes = [module.training for module in static.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    dgnet.convert(static, image_size=16, check=IMAGES, weighting="fixed")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert [module.training for module in static.modules()] == modes


# --- what is refused because the result would compute something else


def _through_list(network: Network, x: Tensor) -> Tensor:
    for block in network.other:
        x = block(x)
    return x


def _partly_through_list(network: Network, x: Tensor) -> Tensor:
    x = network.blocks[0](x)
    for block in network.other[1:]:
        x = block(x)
    return x


def _if_block(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        if isinstance(block, Block):
            x = block(x)
    return x


def _looks_inside(network: Network, x: Tensor) -> Tensor:
    assert network.blocks[1].conv1.kernel_size == (3, 3)
    return in_a_row(network, x)


def _through_data(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = block(x)
        x.data.mul_(0.5)
    return x


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (_through_list, "stage blocks.0 is not called: the network holds its blocks in another place too"),
        (_partly_through_list, "the feature after stage blocks.0 differs"),
        (_if_block, "stage blocks.0 is not called"),
        (_looks_inside, "its forward pass reads parts of blocks that are in a stage now .*conv1"),
    ],
    ids=["list", "partly list", "by class", "looks inside"],
)
def test_networks_that_reach_their_blocks_in_another_way_are_refused(steps, reason):
    static = Network(steps)
    static.other = list(static.blocks)
    with pytest.raises(UsageError, match=f"Network cannot be converted without changing its function: {reason}"):
        convert(static)


def test_the_result_is_run_on_images(monkeypatch):
    """Whatever the trace does not see."""
    monkeypatch.setattr("dgnet.models._increment.Increment.forward", lambda self, x: self.block(x))
    with pytest.raises(UsageError, match=r"without changing its function: the feature after stage blocks.0 differs"):
        convert(Network(in_a_row))
    with pytest.raises(UsageError, match="has no run of blocks"):
        convert(Network(_through_data))


class Router(nn.Module):
    def __init__(self, channels: int, edges: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, edges)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(pooled).sigmoid()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"router": Router}, "the feature after stage blocks.0 differs; leave out the options"),
        ({"node_gate": "hard", "node_gate_bias": 0.1, "threshold_offset": 0.1}, "a gate is closed; leave out"),
        ({"node_gate": False}, "unknown node_gate False; allowed: none, hard, gumbel"),
        ({"weighting": 3}, "weighting is routed, signed, linear, softmax, learned, fixed or a callable .* got 3"),
        ({"weighting": [1]}, r"weighting is routed, signed, linear, softmax, learned, fixed or a callable .* got \[1\]"),
        ({"topology": 3}, "topology is a name, a mask, a callable .* got 3"),
        ({"stages": np.array(["blocks", "head"])}, "stages is 'auto' or a list of names"),
    ],
)
def test_options_under_which_the_function_would_change_or_that_mean_nothing(options, line):
    with pytest.raises(UsageError, match=line):
        convert(Network(in_a_row), **options)


# --- further arguments


def _float_for_each_image(network: Network, x: Tensor) -> Tensor:
    scales = [1.0] * len(x)
    for block in network.blocks:
        x = block(x, scales)
    return x


def _images_last(network: Network, x: Tensor) -> Tensor:
    scales = x.mean((2, 3)).t()
    for block in network.blocks:
        x = block(x, scales)
    return x


@pytest.mark.parametrize("steps", [_float_for_each_image, _images_last])
def test_arguments_whose_size_follows_the_number_of_images(steps):
    with pytest.raises(UsageError, match="it is called with further values for each image"):
        convert(Network(steps))


# --- blocks with hooks, or with a forward pass of their own


@pytest.mark.parametrize("name", ["vit", "efficientnet", "convnext"])
@torch.no_grad()
def test_hooks_of_blocks_still_act_and_none_is_called_by_the_conversion(name):
    static, seen = build_static(name), []
    blocks = [module for module in static.modules() if type(module).__name__ in ("Block", "InvertedResidual", "ConvNeXtBlock")]
    blocks[-1].register_forward_hook(lambda module, inputs, output: output * 1.5)
    static.register_forward_hook(lambda *of_hook: seen.append(of_hook[2].device.type))
    converted = dgnet.convert(static)
    assert seen == []
    images = draw_images(name)
    assert largest_difference(converted(images), static(images)) < 2e-6
    assert seen == ["cpu", "cpu"]


@torch.no_grad()
def test_a_block_with_its_own_forward_is_called_whole():
    static = build_static("vit")
    block = static.blocks[2]
    own = type(block).forward
    block.forward = MethodType(lambda self, x, *a, **k: own(self, x, *a, **k) + 0.5 * x, block)
    converted, images = dgnet.convert(static), draw_images("vit")
    assert largest_difference(converted(images), static(images)) < 2e-6


class Skipping(Block):
    """Looks like timm's blocks with `has_skip`, and has an activation after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.has_skip, self.drop_path = True, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.drop_path(self.conv2(self.bn(self.conv1(x)))) + x).relu()


@torch.no_grad()
def test_a_block_that_only_looks_like_timms():
    static = Network(in_a_row)
    static.blocks = nn.ModuleList(Skipping() for _ in range(2))
    converted = convert(static)
    torch.testing.assert_close(converted(IMAGES), static(IMAGES))
    assert dgnet.to_static(converted).blocks[0].has_skip


# --- modes, precision, layout


@torch.no_grad()
def test_modules_keep_their_own_mode():
    static = Network(in_a_row, drop=nn.Dropout(0.5)).train()
    for module in static.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    converted = dgnet.convert(static, image_size=16)
    assert converted.training
    assert find_stages(converted)[0].training
    for mixed in (converted, static):
        assert not any(module.training for module in mixed.modules() if isinstance(module, nn.BatchNorm2d))
    torch.testing.assert_close(converted(IMAGES), static(IMAGES))
    static.eval().drop.train()
    assert dgnet.convert(static, image_size=16).drop.training


class Mixed(Network):
    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.to(torch.bfloat16)).float()
        return self.head(in_a_row(self, x).mean((2, 3)))


@torch.no_grad()
def test_blocks_keep_their_precision():
    static = Mixed(in_a_row).eval()
    static.stem.to(torch.bfloat16)
    static.blocks[0].register_buffer("exact", torch.zeros(1, dtype=torch.float64))
    converted = convert(static, node_gate="hard")
    torch.testing.assert_close(converted(IMAGES), static(IMAGES))
    stage = find_stages(converted)[0]
    assert stage.nodes[0].block.exact.dtype == torch.float64
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_networks_of_another_precision_convert(dtype):
    static = Network(in_a_row).eval().to(dtype)
    converted = convert(static, check=IMAGES.to(dtype))
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert dgnet.describe(converted, image_size=16).stages


@pytest.mark.parametrize(("name", "size"), [("resnet", (48, 60)), ("convnext", (64, 48))])
@torch.no_grad()
def test_the_layout_follows_from_the_layers_whatever_the_size(name, size):
    static = build_static(name)
    channels = {run.name: run.channels for run in dgnet.convert(static).conversion.stages}
    converted = dgnet.convert(static, image_size=size)
    assert {run.layout for run in converted.conversion.stages} == {"NCHW"}
    assert {run.name: run.channels for run in converted.conversion.stages} == channels
    images = draw_images(name)
    assert largest_difference(converted(images), static(images)) < 2e-6


def test_a_map_as_high_as_it_has_channels():
    static = Network(in_a_row)
    (run,) = dgnet.convert(static.eval(), image_size=(8, 16)).conversion.stages  # maps of (4, 4, 8)
    assert (run.layout, run.channels) == ("NCHW", 4)


# --- what the caller has set around


@torch.no_grad()
def test_a_conversion_inside_other_contexts():
    static = Network(in_a_row).eval()
    with torch.device("meta"):
        assert not next(convert(static).parameters()).is_meta
    with torch.inference_mode():
        converted = convert(static)
    torch.testing.assert_close(converted(IMAGES), static(IMAGES))
    with torch.autocast("cpu"):
        assert convert(static).conversion.stages
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert {parameter.dtype for parameter in convert(static).parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


# --- mistakes


class Registered(Network):
    kinds: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, kind: str) -> None:
        cls.kinds[kind] = cls


def test_a_class_that_enters_its_subclasses_in_a_list():
    static = Registered(in_a_row)
    assert convert(static).conversion.stages
    assert Registered.kinds == {}


def _own_attribute() -> nn.Module:
    return Network(in_a_row, conversion=nn.Linear(2, 2))


def _kept_feature() -> nn.Module:
    network = Network(in_a_row)
    network.kept = network.stem(IMAGES)
    return network


class ByName(Network):
    def forward(self, images: Tensor) -> dict[str, list[str]]:
        super().forward(images)
        return {"names": ["cat"]}


@pytest.mark.parametrize(
    ("network", "options", "line"),
    [
        (_own_attribute, {}, "Network has an attribute 'conversion', which dgnet sets; rename it"),
        (_kept_feature, {}, r"Network cannot be copied \(RuntimeError: .*\); set features that it keeps"),
        (lambda: torch.compile(Network(in_a_row), backend="eager"), {}, "the network is compiled; use it before torch.compile"),
        (lambda: Network(in_a_row), {"check": IMAGES.double()}, "does not run on the images of the check, .*float64"),
        (lambda: Network(in_a_row), {"check": IMAGES[:, :2]}, r"does not run on the images of the check, \(4, 2, 16, 16\)"),
        (lambda: ByName(in_a_row), {"check": IMAGES}, "ByName puts out no tensors that could be compared"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(network, options, line):
    with pytest.raises(UsageError, match=line) as raised:
        convert(network(), **options)
    assert "\n" not in str(raised.value)


def test_a_first_convolution_that_does_not_read_the_image():
    static = Network(in_a_row)
    stem = static.stem
    del static.stem
    static.stem = stem  # now after the blocks
    with pytest.raises(UsageError, match=r"3×4×16×16 .* set the network's attribute in_chans"):
        convert(static)
    static.in_chans = 3
    assert convert(static).conversion.stages


def test_a_feature_extractor_is_traced_at_the_size_that_it_is_built_for():
    getter = timm.create_model("test_vit", features_only=True, img_size=32)
    assert dgnet.models.find_image_size(getter) == (32, 32)


# --- a converted network of the user's own


class Masked(Network):
    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean((2, 3)))


class Flat(Network):
    """Takes images of 32 pixels only."""

    def __init__(self) -> None:
        super().__init__(in_a_row)
        self.head = nn.Linear(4 * 16 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(in_a_row(self, self.stem(images)).flatten(1))


@torch.no_grad()
def test_torch_fx_traces_arguments_that_are_none_later():
    static = Masked(in_a_row).eval()
    traced = torch.fx.symbolic_trace(convert(static))
    torch.testing.assert_close(traced(IMAGES), static(IMAGES))


def test_descriptions_of_networks_that_take_one_size_or_read_values():
    flat = dgnet.convert(Flat().eval(), image_size=32)
    assert 0 < dgnet.describe(flat, image_size=32).least_budget < 1
    reads = convert(Network(lambda network, x: in_a_row(network, x) if x.sum().item() else x))
    assert 0 < dgnet.describe(reads, image_size=16).least_budget < 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_cannot_be_described():
    converted = convert(Network(in_a_row))
    with pytest.raises(UsageError, match="model_kwargs has a value that the command line cannot take"):
        dgnet.describe(converted, 16, model_kwargs={"scale": torch.ones(1)})
    converted.head = torch.ao.nn.quantized.dynamic.Linear(4, 5)
    with pytest.raises(UsageError, match="has quantised layers, whose work is not counted"):
        dgnet.describe(converted, 16)
    for function in (dgnet.describe, lambda model: dgnet.set_mode(model, "dense")):
        with pytest.raises(UsageError, match=r"a network is an nn\.Module, got None"):
            function(None)


@torch.no_grad()
def test_static_weights_of_a_network_without_timms_config():
    converted, state = convert(Network(in_a_row), weighting="learned"), Network(in_a_row).state_dict()
    untrained = dgnet.load_static_weights(
        converted, {f"module.{name}": tensor for name, tensor in state.items()}, start="static", image_size=16
    )
    assert untrained == ["blocks.0.weighting.alpha"]
    converted.get_submodule("blocks.0").weighting.alpha.mul_(1.5)
    with pytest.raises(UsageError, match="cannot become static: an edge does not weigh 1; convert the static network again"):
        dgnet.load_static_weights(converted, state, start="static", image_size=16)
    for wrong, line in ((None, "a state dict maps names to tensors, got None"), ({"a": "b"}, "holds tensors, got a='b'")):
        with pytest.raises(UsageError, match=line):
            dgnet.load_static_weights(converted, wrong)


@torch.no_grad()
def test_to_static_compares_what_parameters_do_not_say():
    converted = convert(Network(in_a_row), weighting="fixed", node_gate="hard")
    stage = find_stages(converted)[0]
    stage.threshold_offset = 0.49
    with pytest.raises(UsageError, match="a gate is closed"):
        dgnet.to_static(converted)
    stage.threshold_offset = 0.0
    stage.nodes[1].register_forward_hook(lambda module, inputs, output: None)  # hooks are no part of it
    assert dgnet.to_static(converted)
    receivers = stage.topology.free_receivers
    stage.weighting.predict = lambda node, feature: torch.full((len(feature), len(receivers(node))), 0.5)
    stage.weighting.__class__ = type("Half", (dgnet.Weighting,), {})
    with pytest.raises(UsageError, match=r"cannot become static: the feature after stage blocks.0 differs"):
        dgnet.to_static(converted)
