"""`dgnet.convert`: the same function at the start; which blocks become stages; the way back; mistakes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UnknownOptionError, UsageError
from dgnet.graph import find_stages, record_connectivity
from dgnet.models._convert import find_change
from tests.helpers.static import LAYOUTS, NETWORKS, build_static, draw_images, largest_difference, use_gates

# --- the same function


@pytest.mark.parametrize("node_gate", [None, "hard"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_converted_network_computes_the_same_function(name, node_gate):
    static, images = build_static(name), draw_images(name)
    converted = dgnet.convert(static, node_gate=node_gate)
    assert largest_difference(converted(images), static(images)) < 1e-5
    assert {run.layout for run in converted.conversion.stages} == {LAYOUTS[name]}
    assert isinstance(converted, type(static))
    assert type(converted).__name__ == f"Dynamic{type(static).__name__}"
    assert largest_difference(converted.train()(images), static.train()(images)) < 1e-5
    for other, tensor in static.named_buffers():  # statistics that training has updated
        ours = converted.get_buffer(_rename(other, converted.static_names))
        torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"weighting": "learned"}, {"weighting": "fixed"}, {"gate": "alpha"}, {"node_gate": "gumbel"}]
)
@torch.no_grad()
def test_each_weighting_starts_with_the_same_function(options):
    static, images = build_static("vit"), draw_images("vit")
    assert largest_difference(dgnet.convert(static, **options)(images), static(images)) < 1e-5


@pytest.mark.parametrize("name", ["resnet", "convnext", "efficientnet", "vit", "swin", "eva"])
def test_gradients_of_static_parameters_start_as_in_the_static_network(name):
    static = build_static(name).double()
    converted = dgnet.convert(static, node_gate="hard")
    images = draw_images(name, dtype=torch.float64)
    for network in (static, converted):
        network(images).square().sum().backward()
    for parameter_name, parameter in static.named_parameters():
        ours = converted.get_parameter(_rename(parameter_name, converted.static_names))
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-8, atol=1e-9, msg=parameter_name)
    added = [parameter for n, parameter in converted.named_parameters() if ".weighting.routers." in n]
    assert any(parameter.grad.any() for parameter in added)


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "eva"])
@torch.no_grad()
def test_a_skipped_block_is_left_out_of_the_static_network(name):
    static, images = build_static(name).double(), draw_images(name, 6, torch.float64)
    converted = dgnet.convert(static, weighting="fixed", node_gate="hard")
    use_gates(converted)
    with record_connectivity(converted) as record:
        found = converted(images)
    ran = [
        dict(zip(run.blocks, record.ran[i][:, 1:].unbind(1), strict=False)) for i, run in enumerate(converted.conversion.stages)
    ]
    decided = {block: column for stage in ran for block, column in stage.items()}
    assert any(column.any() and not column.all() for column in decided.values())
    for b, image in enumerate(images):
        shorter = deepcopy(static)
        for block, column in decided.items():
            if not column[b]:
                shorter.set_submodule(block, _PassOn())
        torch.testing.assert_close(found[b], shorter(image[None])[0], rtol=1e-9, atol=1e-9)


def test_conversion_keeps_the_original_and_its_mode():
    static = build_static("resnet").train()
    before = {name: tensor.clone() for name, tensor in static.state_dict().items()}
    converted = dgnet.convert(static)
    assert converted.training
    assert not dgnet.convert(static.eval()).training
    for parameter in converted.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in static.state_dict().items())
    assert not find_stages(static)


# --- the way back


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_to_static_gives_the_network_back(name):
    static, images = build_static(name), draw_images(name)
    again = dgnet.to_static(dgnet.convert(static, node_gate="hard"))
    assert type(again) is type(static)
    assert vars(again).keys() == vars(static).keys()
    expected = static.state_dict()
    assert list(again.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert [type(module) for module in again.modules()] == [type(module) for module in static.modules()]
    assert torch.equal(again(images), static(images))


def test_to_static_refuses_what_has_changed():
    with pytest.raises(UsageError, match=r"ResNet was not made by dgnet\.convert"):
        dgnet.to_static(build_static("resnet"))
    converted = dgnet.convert(build_static("resnet"), node_gate="hard")
    stage, *_ = find_stages(converted)
    for change, reason in (
        (lambda s: nn.init.ones_(s.weighting.routers["1"].weight), "its weights depend on the image"),
        (lambda s: nn.init.ones_(s.weighting.routers["1"].bias), "an edge does not weigh 1"),
        (lambda s: nn.init.constant_(s.weighting.tau, 2.0), "an edge is closed"),
        (lambda s: nn.init.ones_(s.node_gates.columns["0"].weight), "its gates depend on the image"),
        (lambda s: nn.init.constant_(s.node_gates.bias, -1.0), "a gate is closed"),
    ):
        changed = deepcopy(converted)
        change(find_stages(changed)[0])
        with pytest.raises(UsageError, match=f"stage {converted.graph_names[0]} cannot become static: {reason}"):
            dgnet.to_static(changed)
    assert find_change(stage) == ""


# --- networks of the user's own


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.first(x) if shift is None else self.first(x + shift)
        return x + scale * self.second(y.relu())


class Network(nn.Module):
    """Stem, blocks and classifier. `forward` calls the blocks with `call`."""

    def __init__(self, blocks: nn.Module, call=None) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), blocks, nn.Linear(4, 5)
        self.call = call

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.blocks(x) if self.call is None else self.call(self, x)
        return self.head(x.mean((2, 3)))


def _loop(network: Network, x: Tensor) -> Tensor:
    for block in network.blocks:
        x = block(x)
    return x


def _shift(network: Network, x: Tensor) -> Tensor:
    shift = x.mean((0, 2, 3), keepdim=True)[:, :1]
    for block in network.blocks:
        x = block(x, shift, scale=0.5)
    return x


def _by_name(network: Network, x: Tensor) -> Tensor:
    for _, block in network.blocks.named_children():
        x = block(x)
    return x


OWN = {
    "sequential": lambda: Network(nn.Sequential(*(Block() for _ in range(3)))),
    "list": lambda: Network(nn.ModuleList(Block() for _ in range(3)), _loop),
    "module": lambda: Network(nn.ModuleDict({f"b{i}": Block() for i in range(3)}), _by_name),
    "further arguments": lambda: Network(nn.ModuleList(Block() for _ in range(3)), _shift),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_network_of_the_users_own(kind):
    static = OWN[kind]()
    images = torch.randn(4, 3, 16, 16)
    converted = dgnet.convert(static, image_size=16, check=images)
    (run,) = converted.conversion.stages
    assert len(run.blocks) == 3
    assert run.block_class == "Block"
    assert converted.conversion.agreement.difference < 1e-6
    torch.testing.assert_close(converted(images), static(images))
    assert converted.group_matcher()("head.weight") == 0
    assert converted.no_weight_decay() == {f"{run.name}.weighting.tau"}
    assert torch.equal(dgnet.to_static(converted)(images), static(images))


def _twice(network: Network, x: Tensor) -> Tensor:
    for block in (*network.blocks, network.blocks[0]):
        x = block(x)
    return x


def _tapped(network: Network, x: Tensor) -> Tensor:
    taps = []
    for block in network.blocks:
        x = block(x)
        taps.append(x)
    return x + taps[0]


def _per_image(network: Network, x: Tensor) -> Tensor:
    shift = x.mean((1, 2, 3), keepdim=True)
    for block in network.blocks:
        x = block(x, shift)
    return x


def _each_another(network: Network, x: Tensor) -> Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x, None, 0.5 + number)
    return x


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.second(self.first(x).relu())
        return x


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def _shared() -> nn.ModuleList:
    blocks = nn.ModuleList(Block() for _ in range(2))
    blocks[1].second = blocks[0].second
    return blocks


@pytest.mark.parametrize(
    ("blocks", "call", "reason"),
    [
        (lambda: nn.ModuleList(Block() for _ in range(2)), _twice, "blocks.0: it is called 2 times"),
        (_shared, _loop, "blocks.0: it shares parameters with|blocks.1: it shares parameters with"),
        (lambda: nn.ModuleList(Block() for _ in range(2)), _per_image, "it is called with further values for each image"),
        (
            lambda: nn.ModuleList(Block() for _ in range(2)),
            _each_another,
            "it is one block only, and has no gate",
        ),
        (lambda: nn.ModuleList(InPlace() for _ in range(2)), _loop, "it changes its input in place"),
        (lambda: nn.ModuleList(Plain() for _ in range(2)), _loop, "it has no residual shortcut"),
        (lambda: nn.ModuleList([Block()]), _loop, "it is one block only"),
        (lambda: nn.Identity(), None, "it has no residual blocks"),
    ],
    ids=[
        "called twice",
        "shared",
        "values for each image",
        "other arguments",
        "in place",
        "no shortcut",
        "one block",
        "no block",
    ],
)
def test_blocks_that_stay_static_and_why(blocks, call, reason):
    with pytest.raises(UsageError, match=f"Network has no run of blocks that could become a stage .*({reason})"):
        dgnet.convert(Network(blocks(), call), image_size=16)


def test_a_feature_that_is_read_later_too_ends_a_run():
    static = Network(nn.ModuleList(Block() for _ in range(4)), _tapped)
    images = torch.randn(4, 3, 16, 16)
    converted = dgnet.convert(static, image_size=16)
    assert [run.blocks for run in converted.conversion.stages] == [("blocks.1", "blocks.2", "blocks.3")]
    assert [(block.name, block.reason.partition(",")[0]) for block in converted.conversion.static] == [
        ("blocks.0", "it is one block only")
    ]
    torch.testing.assert_close(converted(images), static(images))


def test_named_stages_take_blocks_without_shortcut():
    static = Network(nn.ModuleList(Plain() for _ in range(2)), _loop)
    images = torch.randn(4, 3, 16, 16)
    converted = dgnet.convert(static, image_size=16, stages=["blocks"])
    assert converted.conversion.within == ("blocks",)
    torch.testing.assert_close(converted(images), static(images))
    resnet = build_static("resnet", layers=(3, 3, 1, 1))
    assert dgnet.convert(resnet).graph_names == ("layer1.0", "layer2.1")  # layer2.0 changes the shape
    converted = dgnet.convert(resnet, stages="layer2")
    assert converted.graph_names == ("layer2.1",)
    assert {block.reason for block in converted.conversion.static if block.name.startswith("layer1")} == {
        "it is in none of the named stages"
    }


def test_a_network_that_cannot_run_on_the_meta_device():
    def call(network: Network, x: Tensor) -> Tensor:
        return _loop(network, x) if x.sum().item() else x

    static = Network(nn.ModuleList(Block() for _ in range(2)), call)
    assert len(dgnet.convert(static, image_size=16).conversion.stages[0].blocks) == 2


# --- mistakes


@pytest.mark.parametrize(
    ("network", "options", "line"),
    [
        (lambda: nn.Embedding(4, 4), {}, r"Embedding cannot be converted: it takes no images of .*×224 \(.*\); give"),
        (lambda: build_static("vit"), {"image_size": 20}, "VisionTransformer cannot be converted: it takes no"),
        (lambda: build_static("resnet", layers=(1, 1, 1, 1)), {}, r"ResNet has no run .*layer2.0: it changes the shape"),
        (lambda: build_static("resnet"), {"stages": "layer9"}, r"stages names 'layer9', which ResNet does not have"),
        (lambda: build_static("resnet"), {"stages": 3}, "stages is 'auto' or a list of names of modules, got 3"),
        (lambda: build_static("resnet"), {"stages": []}, r"stages is 'auto' or a list of names of modules, got \[\]"),
        (lambda: dgnet.convert(build_static("resnet")), {}, "DynamicResNet is dynamic already"),
        (lambda: dgnet.create_model("dg_resnet20"), {}, "DynamicCifarResNet is dynamic already"),
        (lambda: build_static("resnet"), {"topology": "chain"}, "another function: in stage 1, layer1.0, it lacks edges"),
        (lambda: build_static("resnet"), {"router_std": 0.1}, "its weights depend on the image; leave out the options"),
        (lambda: build_static("resnet"), {"node_gate": "hard", "node_gate_bias": -1.0}, "a gate is closed; leave out"),
        (lambda: build_static("resnet"), {"weighting": "learned", "learned_start": 0.5}, "an edge does not weigh 1"),
        (lambda: build_static("resnet"), {"shortcut": "node"}, "shortcut='node' is not possible"),
        (lambda: "resnet18", {}, "convert takes a network, an nn.Module, got 'resnet18'; build it with timm.create_model"),
        (lambda: build_static("resnet"), {"image_size": 0}, "image_size is a number of pixels, or height and width, got 0"),
        (lambda: build_static("resnet"), {"image_size": "x"}, "image_size is a number of pixels, or height and width, got 'x'"),
        (lambda: build_static("resnet"), {"check": "photos"}, r"check is a batch of images, \(B, C, H, W\), got 'photos'"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(network, options, line):
    built = network()
    with pytest.raises(UsageError, match=line) as raised:
        dgnet.convert(built, **options)
    assert "\n" not in str(raised.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(UnknownOptionError, match="conversion has no option 'topologie'; did you mean 'topology'"):
        dgnet.convert(build_static("resnet"), topologie="complete")


def test_the_check_refuses_a_network_that_differs(monkeypatch):
    static, images = build_static("resnet"), draw_images("resnet")
    converted = dgnet.convert(static)
    monkeypatch.setattr("dgnet.models._increment.Increment.forward", lambda self, x: self.block(x))
    with pytest.raises(UsageError, match=r"the converted network differs from ResNet by .* name the modules to convert"):
        dgnet.models.check_agreement(static, converted, images)


class _PassOn(nn.Module):
    def forward(self, x: Tensor, *further: object, **named: object) -> Tensor:
        return x


def _rename(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
