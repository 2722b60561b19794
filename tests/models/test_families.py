"""Every network: the static one inside it, its weights, its gradients, its way through a checkpoint."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import Topology, Weighting, find_stages
from dgnet.models._dynamic import DynamicNetwork
from tests.helpers.networks import FAMILIES, build_meta, shake_norms
from tests.helpers.pairs import pairwise

DYNAMIC = [name for name in dgnet.list_models() if isinstance(build_meta(name), DynamicNetwork)]
WITH_STATIC = [name for name in DYNAMIC if "randwire" not in name]
# One a family, as small as it comes, with the least size of image that its strides allow.
STRIDED = ("dg_resnet18", "dg_resnet50", "dg_resnet101", "dg_resnext50_32x4d")


# Two sources, which both claim to read the raw input; ResNet's second block cannot.
TWO_ENTRIES = Topology(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]), entry=(1, 2))


def static_counterpart(name: str) -> nn.Module:
    """timm's network; for ResNet and ResNeXt on DG's stem."""
    return dgnet.create_model(name.replace("dg_", "strided_" if name in STRIDED else ""))


@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in WITH_STATIC])
@torch.no_grad()
def test_chain_fixed_with_the_shortcut_in_the_node_is_the_static_network(name):
    static = shake_norms(static_counterpart(name))
    dynamic = dgnet.create_model(name, topology="chain", weighting="fixed", shortcut="node")
    assert dgnet.load_static_weights(dynamic, static.state_dict()) == []
    images = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        assert torch.equal(dynamic.train(training)(images), static.train(training)(images))


@torch.no_grad()
def test_complete_fixed_is_mobilenetv2_without_the_added_projections():
    static = shake_norms(timm.create_model("mobilenetv2_100")).eval()
    dynamic = dgnet.create_model("dg_mobilenetv2_100", weighting="fixed").eval()
    untrained = dgnet.load_static_weights(dynamic, static.state_dict())
    assert {name.split(".")[2] for name in untrained} == {"input"}
    for stage in find_stages(dynamic):
        nn.init.zeros_(stage.input[1].weight)
        nn.init.zeros_(stage.input[1].bias)
    images = torch.randn(2, 3, 64, 64)
    # The first block's output reaches the later ones over every edge; a chain of additions is the sum over all paths.
    torch.testing.assert_close(dynamic(images), static(images), rtol=1e-4, atol=1e-4)


TORCHVISION = {
    "dg_mobilenetv2_100": torchvision.models.mobilenet_v2,
    "dg_resnet18": torchvision.models.resnet18,
    "dg_resnext50_32x4d": torchvision.models.resnext50_32x4d,
    "dg_regnetx_016": torchvision.models.regnet_x_1_6gf,
}


@pytest.mark.parametrize("name", TORCHVISION)
@torch.no_grad()
def test_weights_of_torchvision(name):
    static = shake_norms(TORCHVISION[name]()).eval()
    dynamic = dgnet.create_model(name, topology="chain", weighting="fixed", shortcut="node").eval()
    in_another_order = dict(sorted(static.state_dict().items()))  # as a safetensors file gives them
    untrained = dgnet.load_static_weights(dynamic, in_another_order)
    # A ResNet-18 has no projection in stage 1.
    assert {name.rpartition(".")[0] for name in untrained} == ({"layer1.input.0", "layer1.input.1"} if "18" in name else set())
    if name in STRIDED:  # another stem; the twin on DG's takes the same weights
        static_twin = static_counterpart(name).eval()
        static_twin.load_state_dict({**static_twin.state_dict(), **static.state_dict()})
        if "18" in name:
            static_twin.layer1[0].downsample = dynamic.layer1.input
        static = static_twin
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(dynamic(images), static(images), rtol=1e-4, atol=1e-4)


def test_what_a_static_network_lacks_is_listed_and_a_head_of_other_classes_stays():
    static = dgnet.create_model("resnet20", num_classes=10)
    dynamic = dgnet.create_model("dg_resnet20", num_classes=3)
    before = copy.deepcopy(dynamic.state_dict())
    untrained = dgnet.load_static_weights(dynamic, static.state_dict())
    expected = [name for name in before if ".weighting." in name or name.startswith("fc.")]
    # Stage 1 of the CIFAR form keeps its shape: its input node is the identity.
    assert untrained == expected
    after = dynamic.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in untrained)
    assert torch.equal(after["layer2.nodes.1.conv1.weight"], static.layer2[1].conv1.weight)
    assert torch.equal(after["layer2.input.0.weight"], static.layer2[0].downsample[0].weight)


def test_static_weights_start_a_network_with_gates_on_its_blocks():
    static = timm.create_model("resnet18")
    dynamic = dgnet.create_model("dg_resnet18", node_gate="hard")
    untrained = dgnet.load_static_weights(dynamic, static.state_dict())
    gates = {name for name in dynamic.state_dict() if ".node_gates." in name}
    assert gates <= set(untrained)
    assert torch.equal(dynamic.layer2.nodes[1].conv1.weight, static.layer2[1].conv1.weight)


def test_static_weights_of_another_family_are_refused():
    dynamic = dgnet.create_model("dg_resnet18")
    before = copy.deepcopy(dynamic.state_dict())
    for other in ("resnet34", "regnetx_006", "mobilenetv2_100"):
        with pytest.raises(UsageError, match="not the weights of the static counterpart of DynamicResNet"):
            dgnet.load_static_weights(dynamic, timm.create_model(other).state_dict())
    weights = timm.create_model("resnet18").state_dict()
    del weights["bn1.bias"]
    with pytest.raises(UsageError, match=r"0 tensors are unknown or have another shape, 1 are missing \(it lacks bn1\.bias\)"):
        dgnet.load_static_weights(dynamic, weights)
    weights = {name: tensor for name, tensor in timm.create_model("resnet18").state_dict().items() if "downsample" not in name}
    with pytest.raises(UsageError, match=r"it lacks layer2\.input\.0\.weight"):
        dgnet.load_static_weights(dynamic, weights)
    with pytest.raises(UsageError, match="the weights of a dynamic network; load them with load_state_dict"):
        dgnet.load_static_weights(dynamic, dgnet.create_model("dg_resnet18", topology="chain").state_dict())
    assert all(torch.equal(value, before[name]) for name, value in dynamic.state_dict().items())
    for model in (dgnet.create_model("resnet20"), dgnet.create_model("dg_randwire_small", num_blocks=2, channels=4)):
        with pytest.raises(UsageError, match="has no static counterpart"):
            dgnet.load_static_weights(model, {})


@pairwise(name=list(FAMILIES), topology=["complete", "residual", "chain", "er"], weighting=["routed", "learned", "fixed"])
def test_every_parameter_gets_a_finite_gradient(name, topology, weighting):
    check_step(dgnet.create_model(name, topology=topology, weighting=weighting, num_classes=5, **FAMILIES[name]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "randwire" not in name])
def test_every_parameter_gets_a_finite_gradient_with_the_shortcut_in_the_node(name):
    check_step(dgnet.create_model(name, shortcut="node", num_classes=5))


@pytest.mark.parametrize("weighting", ["routed", "learned", pytest.param("fixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("topology", ["ba", "ws"])
def test_every_parameter_of_a_random_graph_gets_a_finite_gradient(topology, weighting):
    options = FAMILIES["dg_randwire_small"]
    check_step(dgnet.create_model("dg_randwire_small", topology=topology, weighting=weighting, num_classes=5, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DYNAMIC if name not in FAMILIES])
def test_every_network_takes_a_step(name):
    check_step(dgnet.create_model(name, num_classes=5))


def check_step(model: nn.Module) -> None:
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = nn.functional.cross_entropy(model.train()(images), labels)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    optimizer.step()
    assert model(images).isfinite().all()


@pytest.mark.parametrize("name", DYNAMIC)
@torch.no_grad()
def test_features_have_the_promised_channels_and_strides(name):
    model = timm.create_model(name, features_only=True).eval().to("meta")
    features = model(torch.empty(1, 3, 64, 96, device="meta"))
    assert len(features) == len(model.feature_info)
    for feature, channels, stride in zip(features, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("name", [*FAMILIES, "randwire_small_er", "randwire_small_ba", "randwire_small_ws"])
@torch.no_grad()
def test_a_network_comes_back_from_its_options_and_state(name, monkeypatch):
    options = {"num_blocks": 8, "channels": 8} if "randwire" in name else {}
    if name == "dg_mobilenetv2_100":
        options = {"topology": "er", "topology_seed": 3, "weighting": "learned"}
    if name == "dg_resnet18":
        options = {"topology": "complete,chain,er,residual"}
    if name == "dg_resnet20":
        options = {"topology": lambda num_nodes: torch.ones(num_nodes, num_nodes).tril(-1).triu(-2)}
    model = shake_norms(dgnet.create_model(name, num_classes=5, **options)).eval()
    # Another version of networkx may draw other graphs: the stored one must not depend on it.
    for generator in ("erdos_renyi_graph", "barabasi_albert_graph", "watts_strogatz_graph"):
        monkeypatch.setattr(f"networkx.{generator}", None)
    given = {name: value for name, value in options.items() if name != "topology_seed"}
    again = dgnet.create_model(name, num_classes=5, **{**given, **model.stored_options()}).eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), model(images))


@torch.no_grad()
def test_a_router_on_each_in_edge_is_the_same_function(monkeypatch):
    """§6.2: a router on the out-edges, and one on each in-edge that has its column of W."""
    model = dgnet.create_model("dg_resnet20").eval()
    for stage in find_stages(model):
        for router in stage.weighting.routers.values():
            nn.init.normal_(router.weight)
    images = torch.randn(3, 3, 32, 32)
    expected = model(images)

    class InEdgeRouting(nn.Module):
        """Eq. (3) with α_ij = σ(w_ijᵀ GAP(x_i) + b_ij), asked for by the receiving node."""

        def __init__(self, stage):
            super().__init__()
            self.stage = stage
            self.routers = {}
            for i in range(stage.topology.num_nodes - 1):
                for row, j in enumerate(stage.topology.receivers(i)):
                    router = nn.Linear(stage.weighting.channels, 1)
                    router.weight.copy_(stage.weighting.routers[str(i)].weight[row : row + 1])
                    router.bias.copy_(stage.weighting.routers[str(i)].bias[row : row + 1])
                    self.routers[i, j] = router

        def forward(self, x):
            stage = self.stage
            last = stage.topology.num_nodes - 1
            features = [stage.input(x)]
            for j in range(1, last + 1):
                total = 0
                for i in range(j):
                    alpha = self.routers[i, j](features[i].mean((2, 3))).sigmoid()
                    psi = alpha * (alpha - stage.weighting.tau[j]).sigmoid()
                    total = total + psi[:, :, None, None] * (x if j == 1 else features[i])
                total = total if j == 1 else stage.activation(total)
                if j < last:
                    features.append(stage.nodes[j - 1](total))
            return total

    for name in model.stage_names:
        setattr(model, name, InEdgeRouting(getattr(model, name)))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dg_resnet18", {"router_start": "ba"}, "stage 1: topology 'ba' with ba_m=5 needs at least 6 blocks, the stage has 2"),
        ("dg_resnet18", {"router_start": "era"}, "unknown router_start 'era'; did you mean 'er'"),
        ("dg_resnet18", {"router_start": ["er"]}, r"unknown router_start \['er'\]"),
        (
            "dg_resnet18",
            {"weighting": "learned", "router_start": "er"},
            "router_start='er' has no effect with weighting='learned'",
        ),
        ("dg_resnet18", {"topology": "chain", "router_start": "er"}, "router_start='er' opens a part of topology='complete'"),
        (
            "dg_resnet18",
            {"router": nn.Linear, "router_start": "er"},
            "router_start='er' has no effect with a router of your own",
        ),
        ("dg_resnet18", {"topology": "ba"}, "stage 1: topology 'ba' with ba_m=5 needs at least 6 blocks, the stage has 2"),
        ("dg_resnet50", {"topology": "ws"}, "stage 1: topology 'ws' with ws_k=4, ws_p=0.75 needs at least 5 blocks, the stage"),
        ("randwire_small_er", {"er_p": 0.01}, "stage 1: topology 'er' with er_p=0.01 gave no connected graph of 32 blocks"),
        ("randwire_small_er", {"er_p": 2}, "er_p must be 0 to 1, got 2"),
        ("randwire_small_er", {"ba_m": 3}, "ba_m=3 has no effect with topology='er'; leave it out, or use topology='ba'"),
        ("dg_resnet18", {"topology_seed": 1}, "has no effect with topology='complete'; leave it out, or use topology='er' or"),
        ("randwire_small_ws", {"topology_seed": 1.5}, "topology_seed must be a whole number, got 1.5"),
        ("randwire_small_ba", {"ba_m": 0}, "ba_m must be at least 1, got 0"),
        ("dg_resnet20", {"topology": "chain,star,chain"}, "unknown topology 'star'"),
        ("dg_resnet20", {"topology": ["chain"]}, "topology lists 1 stages, the network has 3"),
        ("dg_resnet20", {"topology": "chain,chain,chain,chain"}, "topology lists 4 stages, the network has 3"),
        ("dg_resnet18", {"topology": Topology(torch.ones(4, 4).tril(-1), entry=())}, "node 1 changes the shape and must be"),
        ("dg_resnet18", {"topology": TWO_ENTRIES}, "node 2 cannot read the raw stage input and must not be an entry"),
        ("dg_randwire_small", {"shortcut": "node"}, "shortcut='node' is not possible: the blocks of this network have no"),
        ("dg_mobilenetv2_100", {"router_reads": "activation"}, "router_reads='activation' has no effect: this network has no"),
        ("dg_resnet20", {"weighting": "learned", "learned_start": 0}, "learned_start must not be 0"),
        ("dg_resnet20", {"topology": {"num_nodes": 5, "edges": [[-1, 2]]}}, "a topology is"),
        ("dg_resnet20", {"topology": {"num_nodes": 3, "edges": [[0, 1, 2]]}}, "a topology is"),
        ("randwire_small_ws", {"ws_k": 3}, "ws_k must be even"),
        ("randwire_small_er", {"channels": 1}, "channels must be at least 2, got 1"),
        (
            "dg_resnet20",
            {"topology": torch.ones(5, 5).tril(-1), "layers": [1, 1, 1]},
            "^dg_resnet20 cannot be built with topology=",
        ),
        ("dg_resnet20", {"checkpoint_path": "nowhere.pth"}, "dg_resnet20 cannot be built with checkpoint_path='nowhere.pth'"),
        ("dg_resnet20", {"topology": {"edges": [[0, 1]]}}, r"stage 1: a topology is \{num_nodes, edges"),
        ("dg_resnet20", {"topology": torch.ones(5, 5)}, "stage 1: node 0 is the input node and has no in-edges"),
        ("dg_resnet20", {"topology": torch.eye(4).roll(1, 0).tril(-1)}, "the stage has 5 nodes"),
        (
            "mrla_resnet20",
            {"channels": (16, 32, 48)},
            "channels must be at most 32 or a multiple of 32, the channels of a head",
        ),
        ("randwire_small_er", {"num_block": 3}, "randwire_small_er has no option 'num_block'; did you mean 'num_blocks'"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UsageError, match=message):
        dgnet.create_model(name, **options)


def test_networks_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        models = [dgnet.create_model(name) for name in ("dg_resnet18", "dg_mobilenetv2_100", "randwire_small_er")]
    assert all(parameter.is_meta for model in models for parameter in model.parameters())


def test_a_network_from_the_meta_device_computes_what_its_weights_say():
    trained = dgnet.create_model("dg_resnet20", weighting="fixed").eval()
    with torch.device("meta"):
        network = dgnet.create_model("dg_resnet20", weighting="fixed").eval()
    network.to_empty(device="cpu").load_state_dict(trained.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), trained(images))


def test_a_weighting_of_the_users_own_sees_the_projection_on_every_topology():
    class Pooled(Weighting):
        def __init__(self, topology, channels):
            super().__init__(topology, channels)
            self.linear = nn.Linear(channels, 1)

        def predict(self, node, feature):
            return self.linear(feature.mean((2, 3))).expand(-1, len(self.topology.free_receivers(node)))

    check_step(dgnet.create_model("dg_resnet20", topology="chain", weighting=Pooled))


def test_resnetv2_is_the_pre_activation_network():
    """Written out from He et al. (2016b), Fig. 4e, with torch's functions."""
    network = dgnet.create_model("resnetv2_20").eval()
    shake_norms(network)
    images = torch.randn(2, 3, 16, 16)

    def activate(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(
            (x - norm.running_mean[:, None, None])
            / (norm.running_var[:, None, None] + norm.eps).sqrt()
            * norm.weight[:, None, None]
            + norm.bias[:, None, None]
        )

    x = network.conv1(images)
    for stage in (network.layer1, network.layer2, network.layer3):
        for block in stage:
            y = activate(block.bn1, x)
            shortcut = x if y.shape[1] == block.conv1.out_channels else block.downsample(y)
            x = shortcut + block.conv2(activate(block.bn2, block.conv1(y)))
    expected = network.fc(activate(network.norm, x).mean((2, 3)))
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    features = timm.create_model("resnetv2_20", features_only=True)(images)
    assert [feature.shape[1] for feature in features] == [16, 16, 32, 64]
