"""Dynamic networks answer to timm's interface as timm's own do."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import dgnet
from dgnet.errors import UnknownOptionError, UsageError
from dgnet.graph import Router, find_stages
from dgnet.models import needed_packages, packaged_names
from dgnet.training import TrainConfig
from dgnet.training._parameter_groups import build_parameter_groups
from tests.helpers.networks import build_meta

DYNAMIC = [name for name in dgnet.list_models() if name.startswith("dg_")]
SMALL = ["dg_resnet18", "dg_resnet20", "dg_mobilenetv2_100", "dg_regnety_006", "dg_randwire_small"]


def test_import_registers_the_models():
    assert {"dg_resnet18", "dg_resnet50", "dg_resnet20", "dg_resnet32", "dg_resnet56", "dg_resnet110"} <= set(
        timm.list_models("dg_*")
    )
    assert {"resnet20", "resnet32", "resnet56", "resnet110"} <= set(dgnet.list_models())
    assert "resnet18" not in dgnet.list_models()  # timm's own


@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in DYNAMIC])
def test_edges_start_open(name):
    model = dgnet.create_model(name)
    for _ in range(2):
        routers = [module for module in model.modules() if isinstance(module, Router)]
        assert len(routers) == sum(stage.topology.num_nodes - 1 for stage in find_stages(model))
        assert all(bool((router.bias == 3).all()) for router in routers)
        model.reset_classifier(7)
    for router in routers:
        nn.init.zeros_(router.bias)
    model.init_weights()
    assert all(bool((router.bias == 3).all()) for router in routers)


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_default_config_is_complete(name):
    model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    for key in ("mean", "std", "input_size", "pool_size", "crop_pct", "interpolation", "num_classes"):
        assert cfg[key]
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert timm.data.resolve_model_data_config(model)["input_size"] == cfg["input_size"]


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_features_head_and_intermediates_agree(name):
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert features.shape[:2] == (2, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(images))
    last, intermediates = model.forward_intermediates(images)
    assert torch.equal(last, features)
    assert len(intermediates) == len(model.feature_info)
    for feature, info in zip(intermediates, model.feature_info, strict=True):
        assert feature.shape == (2, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
    only = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert len(only) == 1
    assert torch.equal(only[0], intermediates[1])


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    features = model(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [64 // f.shape[2] for f in features] == model.feature_info.reduction()
    getter = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=(1, 2)).eval()
    assert len(getter(torch.randn(1, 3, 64, 64))) == 2


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_pruning_keeps_what_is_asked_for(name):
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, 64, 64)
    kept = {"indices": [1], "stop_early": True, "intermediates_only": True}
    (expected,) = model.forward_intermediates(images, **kept)
    before = sum(parameter.numel() for parameter in model.parameters())
    model.prune_intermediate_layers([1])
    assert sum(parameter.numel() for parameter in model.parameters()) < before / 4
    assert torch.equal(model.forward_intermediates(images, **kept)[0], expected)


@pytest.mark.parametrize("name", SMALL)
def test_reset_classifier(name):
    model = timm.create_model(name)
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, model.num_features)


@torch.no_grad()
def test_a_new_classifier_leaves_the_neck_as_trained():
    model = dgnet.create_model("resnetv2_20").eval()
    model.norm.running_mean.fill_(5)
    model.norm.weight.fill_(3)
    keys, features = list(model.state_dict()), model.forward_features(images := torch.randn(2, 3, 32, 32))
    model.reset_classifier(5)
    assert torch.equal(model.forward_features(images), features)
    assert not model.norm.training
    assert list(model.state_dict()) == keys
    assert model(images).shape == (2, 5)
    model.prune_intermediate_layers([1])
    model.reset_classifier(0, "")
    assert isinstance(model.norm, nn.Identity)
    assert not any(name.startswith("norm") for name in model.state_dict())


@pytest.mark.parametrize("name", ["resnet20", "resnetv2_20", "dg_resnet20"])
@torch.no_grad()
def test_a_new_classifier_has_the_device_and_precision_of_the_network(name):
    model = dgnet.create_model(name).double()
    model.reset_classifier(5)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    model.to("meta").reset_classifier(7)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet20", "resnetv2_20"])
def test_gradient_checkpointing_after_pruning(name):
    model, images = dgnet.create_model(name).eval(), torch.randn(2, 3, 32, 32, requires_grad=True)
    model.prune_intermediate_layers([1])
    expected = model(images)
    model.set_grad_checkpointing()
    features = model(images)
    assert torch.equal(features, expected)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in model.layer1.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_parameter_groups(name):
    model = build_meta(name)
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() == {n for n in names if n.endswith("weighting.tau")}
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert set().union(*groups.values()) == names
    blocks = sum(stage.topology.num_nodes - 2 for stage in find_stages(model))
    assert len(groups) == blocks + 2  # stem, each block, head
    assert len(timm.models.group_parameters(model, model.group_matcher(coarse=True))) == len(find_stages(model)) + 2
    assert len(param_groups_layer_decay(model, layer_decay=0.7)) > blocks
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-4, filter_bias_and_bn=True)
    exempt = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(stage.weighting.tau) in exempt for stage in find_stages(model))


def test_learned_weights_are_exempt_from_decay():
    model = dgnet.create_model("dg_resnet20", weighting="learned")
    assert model.no_weight_decay() == {f"layer{i}.weighting.alpha" for i in (1, 2, 3)}


@pytest.mark.parametrize("weighting", ["learned", "signed", "linear", "softmax"])
def test_with_groups_too_only_the_matrices_of_routers_decay(weighting):
    model = dgnet.create_model("dg_resnet20", weighting=weighting, weight_groups=2)
    groups = build_parameter_groups(model, TrainConfig(weight_decay=0.5))
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if ".weighting." in name:
            assert (id(parameter) in decaying) is name.endswith(".weight"), name
    if weighting == "linear":
        assert {f"layer1.weighting.{name}" for name in ("tau", "static", "scale")} <= model.no_weight_decay()


@pytest.mark.parametrize("name", [name for name in DYNAMIC if name not in {n.partition(".")[0] for n in packaged_names()}])
def test_a_network_without_weights_says_so(name):
    with pytest.raises(UsageError, match=f"no pretrained weights are published for {name}"):
        timm.create_model(name, pretrained=True)


def test_timm_arguments_reach_the_network():
    model = dgnet.create_model("dg_resnet18", drop_path_rate=0.1, drop_rate=0.2, in_chans=1, num_classes=3)
    assert sum(isinstance(module, timm.layers.DropPath) for module in model.modules()) == 7  # the first block's rate is 0
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 3)
    cifar = dgnet.create_model("dg_resnet20", drop_path_rate=0.1)
    assert sum(isinstance(module, timm.layers.DropPath) for module in cifar.modules()) == 8


def test_the_projection_is_built_only_if_something_reads_it():
    def has_projection(**kwargs):
        return not isinstance(build_meta("dg_resnet18", **kwargs).layer2.input, nn.Identity)

    assert has_projection()
    assert has_projection(weighting="fixed")
    assert has_projection(topology="chain")  # its router reads it
    assert has_projection(topology="chain", weighting="fixed", shortcut="node")
    assert not has_projection(topology="chain", weighting="fixed")
    assert not has_projection(topology="chain", weighting="learned")


def test_the_topology_and_weighting_can_be_the_users_own():
    from dgnet.graph import FixedWeighting

    class Halves(FixedWeighting):
        def shared_alpha(self, node):
            return super().shared_alpha(node) / 2

    model = dgnet.create_model("dg_resnet20", weighting=Halves, topology=lambda n: torch.ones(n, n).tril(-1)).eval()
    with dgnet.record_connectivity(model) as record:
        model(torch.randn(1, 3, 32, 32))
    assert record.adjacency[0].unique().tolist() == [0, 0.5]


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_resnet20", "dg_regnetx_006"])
def test_a_router_of_the_users_own_starts_its_layers_as_it_likes(name):
    class Convolved(nn.Module):
        def __init__(self, channels, edges):
            super().__init__()
            self.conv = nn.Conv2d(channels, edges, 1)
            nn.init.zeros_(self.conv.weight)
            nn.init.constant_(self.conv.bias, 3)

        def forward(self, pooled):
            return self.conv(pooled[..., None, None]).flatten(1).sigmoid()

    model = dgnet.create_model(name, router=Convolved)
    routers = [module for module in model.modules() if isinstance(module, Convolved)]
    assert len(routers) > 3
    assert all(not router.conv.weight.any() and (router.conv.bias == 3).all() for router in routers)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weighting": "learnd"}, "unknown weighting 'learnd'; did you mean 'learned'"),
        ({"topology": "star"}, "unknown topology 'star'"),
        ({"shortcut": "both"}, "unknown shortcut 'both'"),
        ({"topologie": "chain"}, "has no option 'topologie'; did you mean 'topology'"),
        ({"weighting": "fixed", "router_bias": 0.0}, "router_bias=0.0 has no effect with weighting='fixed'"),
        ({"router_bias": "x"}, "router_bias must be a number, got 'x'"),
        ({"learn_threshold": 1}, "learn_threshold must be true or false"),
        ({"topology": torch.ones(4, 4).tril(-1)}, "stage 1: the stage has 5 nodes"),
    ],
)
def test_bad_connectivity_is_refused_when_the_model_is_built(kwargs, message):
    with pytest.raises(UsageError, match=message):
        dgnet.create_model("dg_resnet20", **kwargs)


@pytest.mark.parametrize(
    ("name", "option"),
    [("dg_resnet20", "topologie"), ("resnet20", "weighting"), ("resnet18", "node_gate"), ("resnet18", "foo")],
)
def test_an_option_that_a_network_lacks_is_told_by_its_name(name, option):
    with pytest.raises(UnknownOptionError) as caught:
        dgnet.create_model(name, num_classes=3, **{option: "x"})
    assert caught.value.option == option


def test_a_bad_value_is_no_unknown_option():
    with pytest.raises(UsageError, match=r"^resnet18 cannot be built with layers=3: TypeError") as caught:
        dgnet.create_model("resnet18", layers=3)
    assert type(caught.value) is UsageError


def test_an_unknown_model_is_answered_with_the_nearest_name():
    with pytest.raises(UsageError, match="unknown model 'dg_resnt50'; did you mean 'dg_resnet50'"):
        dgnet.create_model("dg_resnt50")


def test_topologies_of_the_stages_as_a_tuple():
    listed = ["er", "chain", "er"]
    edges = [
        [stage.topology.num_edges for stage in find_stages(timm.create_model("dg_resnet20", topology=kind(listed)))]
        for kind in (list, tuple)
    ]
    assert edges[0] == edges[1]


def test_packages_of_ones_own_are_needed_only_by_their_networks():
    assert needed_packages("dg_resnet20", "my_package") == []
    assert needed_packages("resnet18.a1_in1k", "my_package") == []
    assert needed_packages("local-dir:FOLDER", "my_package") == []
