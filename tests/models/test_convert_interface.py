"""A converted network answers to timm's interface as the static one does, also by name: create_model(NAME, dynamic=True)."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import find_stages, record_connectivity
from dgnet.inference import set_mode
from tests.helpers.static import NETWORKS, build_static, draw_images, largest_difference, use_gates

# EfficientNet has many layers, and nothing here depends on its blocks.
EACH = [pytest.param(name, marks=pytest.mark.slow) if name == "efficientnet" else name for name in NETWORKS]


def create(name: str, **options: object) -> nn.Module:
    """A network of `NETWORKS` by `dgnet.create_model`."""
    timm_name, given = NETWORKS[name]
    return dgnet.create_model(timm_name, **{**given, **options}).eval()


# --- features


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_features_and_head_start_as_in_the_static_network(name):
    static, images = build_static(name), draw_images(name)
    converted = dgnet.convert(static)
    features = converted.forward_features(images)
    assert largest_difference(features, static.forward_features(images)) < 1e-5
    assert torch.equal(converted.forward_head(features), converted(images))
    assert converted.num_features == static.num_features
    assert converted.get_classifier() is not static.get_classifier()


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_intermediates_start_as_in_the_static_network_at_every_index(name):
    static, images = build_static(name), draw_images(name)
    converted = dgnet.convert(static)
    last, found = converted.forward_intermediates(images)
    expected_last, expected = static.forward_intermediates(images)
    assert len(found) == len(expected) == len(static.feature_info)
    assert largest_difference(last, expected_last) < 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        assert largest_difference(ours, theirs) < 1e-5
    for index in range(len(expected)):  # also those in the middle of a stage
        (only,) = converted.forward_intermediates(images, indices=[index], stop_early=True, intermediates_only=True)
        assert largest_difference(only, expected[index]) < 1e-5
    assert torch.equal(converted(images), converted(images))  # nothing of it remains


@torch.no_grad()
def test_intermediates_leave_out_the_blocks_that_are_skipped():
    static, images = build_static("vit").double(), draw_images("vit", 6, torch.float64)
    converted = dgnet.convert(static, weighting="fixed", node_gate="hard")
    use_gates(converted)
    with record_connectivity(converted) as record:
        found = converted.forward_intermediates(images, intermediates_only=True)
    ran = record.ran[0][:, 1:]
    assert ran.any()
    assert not ran.all()
    for b, image in enumerate(images):
        shorter = deepcopy(static)
        for block, runs in enumerate(ran[b]):
            if not runs:
                shorter.blocks[block] = nn.Identity()
        expected = shorter.forward_intermediates(image[None], intermediates_only=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[b], theirs[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_last_intermediate_is_the_output_for_any_weights():
    converted, images = dgnet.convert(build_static("vit"), node_gate="hard"), draw_images("vit")
    use_gates(converted)
    *_, last = converted.forward_intermediates(images, intermediates_only=True, norm=True, output_fmt="NLC")
    torch.testing.assert_close(last, converted.forward_features(images)[:, 1:], rtol=1e-4, atol=1e-5)


FEATURES = [
    ("resnet", {}),
    ("resnet", {"feature_cls": "getter"}),
    ("convnext", {"out_indices": (1, 2)}),
    ("efficientnet", {}),
    ("efficientnet", {"feature_cls": "hook"}),
    ("vit", {"out_indices": (0, 2)}),
    ("swin", {}),
    ("eva", {}),
]


@pytest.mark.parametrize(("name", "options"), FEATURES, ids=[f"{n}-{'-'.join(map(str, o))}" for n, o in FEATURES])
@torch.no_grad()
def test_features_only(name, options):
    static, converted = (create(name, features_only=True, dynamic=dynamic, **options) for dynamic in (False, True))
    assert isinstance(converted, type(static))
    assert find_stages(converted)
    converted.load_state_dict(static.state_dict())
    images = draw_images(name)
    expected, found = static(images), converted(images)
    assert [feature.shape for feature in found] == [feature.shape for feature in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert largest_difference(ours, theirs) < 1e-5
    assert converted.feature_info.channels() == static.feature_info.channels()
    assert converted.feature_info.reduction() == static.feature_info.reduction()


@pytest.mark.parametrize(
    ("name", "options"), [("convnext", {}), ("vit", {"out_indices": (3,)}), ("vit", {"out_indices": (0, 2)})], ids=str
)
@torch.no_grad()
def test_features_are_the_same_in_the_sparse_mode(name, options):
    converted = create(name, features_only=True, feature_cls="getter", dynamic=True, node_gate="hard", **options)
    use_gates(converted)
    images = draw_images(name, 6)
    dense = converted(images)
    for ours, theirs in zip(set_mode(converted, "sparse")(images), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_features_between_stages_run_no_block_whose_gate_is_closed():
    converted = create("convnext", features_only=True, feature_cls="getter", dynamic=True, node_gate="hard")
    ran = []
    for stage in find_stages(converted):
        nn.init.constant_(stage.node_gates.bias, -9)
        for node in stage.nodes:
            node.register_forward_hook(lambda *_: ran.append(1))
    set_mode(converted, "sparse")(draw_images("convnext"))
    assert not ran
    set_mode(converted, "dense")(draw_images("convnext"))
    assert len(ran) == sum(len(stage.nodes) for stage in find_stages(converted))


# --- classifier, parameters and their groups


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_reset_classifier(name):
    converted, images = dgnet.convert(build_static(name)), draw_images(name)
    stages = [id(stage) for stage in find_stages(converted)]
    converted.reset_classifier(3)
    assert converted(images).shape == (3, 3)
    assert converted.num_classes == 3
    converted.reset_classifier(0)
    assert converted(images).shape == (3, converted.num_features)
    assert [id(stage) for stage in find_stages(converted)] == stages


@pytest.mark.parametrize("name", EACH)
def test_layer_decay_scales_static_parameters_as_before(name):
    static = build_static(name)
    converted = dgnet.convert(static)
    groups = param_groups_layer_decay(converted, 0.05, converted.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(scale) == len(list(converted.parameters()))
    names = converted.static_names
    no_decay = getattr(static, "no_weight_decay", set)()
    expected = param_groups_layer_decay(static, 0.05, no_decay, layer_decay=0.5)
    of_static = {id(p): (group["lr_scale"], group["weight_decay"]) for group in expected for p in group["params"]}
    for parameter_name, parameter in static.named_parameters():
        ours = converted.get_parameter(_rename(parameter_name, names))
        assert scale[id(ours)] == of_static[id(parameter)], parameter_name
    for stage in find_stages(converted):  # what decides is in the group of the stage's first block
        first = next(iter(stage.nodes[0].parameters()))
        assert {scale[id(parameter)][0] for parameter in stage.weighting.parameters()} == {scale[id(first)][0]}


def test_thresholds_and_learned_weights_do_not_decay():
    assert "layer1.0.weighting.tau" in dgnet.convert(build_static("resnet")).no_weight_decay()
    assert "layer1.0.weighting.alpha" in dgnet.convert(build_static("resnet"), weighting="learned").no_weight_decay()
    assert {"pos_embed", "blocks.0.weighting.tau"} <= dgnet.convert(build_static("vit")).no_weight_decay()


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "eva"])
def test_set_grad_checkpointing_changes_no_gradient(name):
    converted = dgnet.convert(build_static(name).double()).train()
    again, images = deepcopy(converted), draw_images(name, dtype=torch.float64)
    again.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in find_stages(again))
    for network in (converted, again):
        network(images).square().sum().backward()
    for (parameter_name, parameter), other in zip(converted.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=parameter_name)


@torch.no_grad()
def test_pruning_keeps_whole_stages():
    static, images = build_static("convnext").eval(), draw_images("convnext")
    converted = dgnet.convert(static)
    left = converted.graph_names[:-1]
    for network in (static, converted):
        network.prune_intermediate_layers([0, 1])
    assert converted.graph_names == tuple(run.name for run in converted.conversion.stages) == left
    pairs = zip(
        *(network.forward_intermediates(images, [0, 1], intermediates_only=True) for network in (static, converted)),
        strict=True,
    )
    for expected, found in pairs:
        torch.testing.assert_close(found, expected)
    converted.load_state_dict(static.state_dict())
    refusing = dgnet.convert(build_static("vit"))
    names = list(refusing.state_dict())
    with pytest.raises(UsageError, match=r"pruning would cut the stage blocks.0: blocks.\d+ goes, blocks.0 stays"):
        refusing.prune_intermediate_layers([0])
    assert list(refusing.state_dict()) == names


# --- state dicts and copies


@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_state_dicts_load(prefix):
    static, images = build_static("convnext"), draw_images("convnext")
    shaken = dgnet.convert(static)
    use_gates(gated := dgnet.convert(static, node_gate="hard"))
    other = create("convnext", num_classes=7, dynamic=True)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items() if "weighting" in name}
    other.load_state_dict({f"{prefix}{name}": tensor for name, tensor in static.state_dict().items()})
    torch.testing.assert_close(other(images), static(images))
    assert before
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())
    nn.init.normal_(find_stages(shaken)[0].weighting.routers["1"].weight)
    other.load_state_dict({f"{prefix}{name}": tensor for name, tensor in shaken.state_dict().items()})
    assert torch.equal(other(images), shaken(images))
    with pytest.raises(RuntimeError, match="node_gates"):
        other.load_state_dict({f"{prefix}{name}": tensor for name, tensor in gated.state_dict().items()})


@torch.no_grad()
def test_parameters_alone_load():
    """As optimisers and averages keep them: without buffers, and so without the masks of stages."""
    trained, other = (dgnet.convert(build_static("vit"), weighting="learned") for _ in range(2))
    for parameter in trained.parameters():
        parameter.mul_(1.1)
    found = other.load_state_dict(dict(trained.named_parameters()), strict=False)
    assert found.unexpected_keys == []
    assert all(torch.equal(*pair) for pair in zip(trained.parameters(), other.parameters(), strict=True))


@torch.no_grad()
def test_replicas_put_out_the_features_between_blocks():
    static, images = build_static("vit"), draw_images("vit")
    converted = dgnet.convert(static)
    replicas = {module: module._replicate_for_data_parallel() for module in converted.modules()}
    for module, replica in replicas.items():  # as `nn.DataParallel` does
        for name, child in module._modules.items():
            replica._modules[name] = child if child is None else replicas[child]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, tensor)
    expected = static.forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(replicas[converted].forward_intermediates(images, intermediates_only=True), expected, strict=True):
        assert largest_difference(ours, theirs) < 1e-5


def test_a_static_state_dict_with_a_missing_tensor_names_it():
    static = build_static("resnet")
    state = static.state_dict()
    del state["layer1.1.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1.0.nodes.1.block.conv1.weight"):
        dgnet.convert(static).load_state_dict(state)


@torch.no_grad()
def test_static_files_load_by_timms_ways(tmp_path):
    static, images = build_static("resnet"), draw_images("resnet")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in static.state_dict().items()}}, tmp_path / "a.pth")
    torch.save(static.state_dict(), tmp_path / "b.pth")
    converted = dgnet.convert(build_static("resnet"))
    load_checkpoint(converted, str(tmp_path / "a.pth"))
    assert torch.equal(converted(images), static(images))
    by_path = create("resnet", num_classes=7, dynamic=True, checkpoint_path=str(tmp_path / "b.pth"))
    assert torch.equal(by_path(images), static(images))
    overlay = {"file": str(tmp_path / "b.pth"), "num_classes": 7}
    pretrained = create("resnet", pretrained=True, num_classes=7, dynamic=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(pretrained(images), static(images))
    other_classes = create("resnet", pretrained=True, num_classes=4, dynamic=True, pretrained_cfg_overlay=overlay)
    assert largest_difference(other_classes.forward_features(images), static.forward_features(images)) < 1e-6
    assert other_classes(images).shape == (3, 4)


def _through_file(network: nn.Module, folder) -> nn.Module:
    torch.save(network, folder / "network.pt")
    return torch.load(folder / "network.pt", weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "file", "average"])
@torch.no_grad()
def test_copies(way, tmp_path):
    converted, images = dgnet.convert(build_static("vit"), node_gate="hard"), draw_images("vit", 6)
    use_gates(converted)
    copies = {
        "deepcopy": lambda: deepcopy(converted),
        "pickle": lambda: pickle.loads(pickle.dumps(converted)),
        "file": lambda: _through_file(converted, tmp_path),
        "average": lambda: ModelEmaV3(converted).module,
    }
    copied = copies[way]()
    assert type(copied) is type(converted)
    assert torch.equal(copied(images), converted(images))
    assert copied.conversion == converted.conversion
    for parameter in converted.parameters():
        nn.init.zeros_(parameter)
    features = copied.forward_intermediates(images, intermediates_only=True)  # the places know the copy's stages
    assert all(feature.abs().max() > 0 for feature in features)
    with record_connectivity(copied) as record:
        copied(images)
    assert len(record.ran) == len(find_stages(copied))


@torch.no_grad()
def test_a_network_moves_and_changes_its_normalisations():
    converted = dgnet.convert(build_static("resnet"))
    assert converted.double()(draw_images("resnet", dtype=torch.float64)).dtype == torch.float64
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(dgnet.convert(build_static("resnet")))
    images = draw_images("resnet")
    torch.testing.assert_close(synchronised(images), build_static("resnet")(images))
    assert len(dgnet.to_static(synchronised).layer1) == 3


# --- by name


@torch.no_grad()
def test_options_of_timm_by_name():
    converted = create("vit", dynamic=True, num_classes=3, in_chans=5, img_size=48, drop_path_rate=0.2)
    assert converted(torch.randn(2, 5, 48, 48)).shape == (2, 3)
    assert find_stages(converted)[0].nodes[-1].block.drop_path1.drop_prob == pytest.approx(0.2)
    windows = dgnet.create_model("test_maxvit", dynamic=True, img_size=96)  # its configuration still says 160
    assert windows.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 1000)
    gated = create("resnet", dynamic=True, node_gate="hard", weighting="fixed", stages=["layer1"])
    assert gated.graph_names == ("layer1.0",)
    assert gated.connectivity_options["weighting"] == "fixed"


def test_stored_options_build_the_same_network_again():
    converted = create("convnext", dynamic=True, node_gate="hard", stages=["stages.2"])
    again = create("convnext", **converted.stored_options())
    assert again.conversion == converted.conversion
    assert again.stored_options() == converted.stored_options()
    again.load_state_dict(converted.state_dict())


def test_preprocessing_comes_from_the_static_network():
    static, converted = create("convnext"), create("convnext", dynamic=True)
    assert converted.pretrained_cfg == static.pretrained_cfg
    assert timm.data.resolve_model_data_config(converted) == timm.data.resolve_model_data_config(static)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("test_resnet", {"dynamic": True}, "ResNet has no run of blocks that could become a stage"),
        ("dg_resnet20", {"dynamic": True}, "dynamic=True converts a static network, and dg_resnet20 is dynamic already"),
        ("test_resnet", {"dynamic": "maybe"}, "dynamic"),
        ("test_vit", {"dynamic": True, "stages": "layers"}, "stages names 'layers', which VisionTransformer does not have"),
        ("test_vit", {"dynamic": True, "stages": ["blocks", 3]}, "stages is 'auto' or a list of names of modules, got"),
        ("test_vit", {"dynamic": True, "topology": "chain"}, "would compute another function"),
        ("test_vit", {"dynamic": True, "nodegate": "hard"}, "test_vit has no option 'nodegate'; did you mean 'node_gate'"),
        ("test_vit", {"stages": "auto"}, "stages"),
    ],
)  # fmt: skip
def test_mistakes_by_name_end_in_one_line(name, options, line):
    with pytest.raises(UsageError, match=line) as raised:
        dgnet.create_model(name, **options)
    assert "\n" not in str(raised.value)


def test_dgnets_own_static_networks_convert():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = dgnet.convert(dgnet.create_model("resnet20"), image_size=32)
    assert len(converted.graph_names) == 3


def _rename(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
