"""Networks of the user's own that convert: what stays as it was, and mistakes on the way."""

from __future__ import annotations

from types import MethodType
from typing import ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import find_stages
from tests.helpers.own_networks import IMAGES, Block, Network, convert, in_a_row
from tests.helpers.static import build_static, draw_images, largest_difference

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
    assert largest_difference(converted(images), static(images)) < 1e-5
    assert seen == ["cpu", "cpu"]


@torch.no_grad()
def test_a_block_with_its_own_forward_is_called_whole():
    static = build_static("vit")
    block = static.blocks[2]
    own = type(block).forward
    block.forward = MethodType(lambda self, x, *a, **k: own(self, x, *a, **k) + 0.5 * x, block)
    converted, images = dgnet.convert(static), draw_images("vit")
    assert largest_difference(converted(images), static(images)) < 1e-5


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
    assert largest_difference(converted(images), static(images)) < 1e-5


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
