"""Dense inference in which the features of a stage give way to partial sums."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.resnet import BasicBlock
from torch import nn

import dgnet
from dgnet.graph import RoutedWeighting, Topology, build_topology, find_stages, partial_sums
from dgnet.graph._aggregate_plain import partial_sums_plain
from dgnet.inference import _partial_sums as module
from dgnet.inference import compile_network
from tests.helpers.networks import close_some, close_some_gates, draw_and_close
from tests.helpers.static import build_static, draw_images, use_gates
from tests.helpers.twins import TOLERANCES, draw_case, sum_by_sample


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    edges=st.integers(1, 7),
    sums=st.integers(0, 7),
    dtype=st.sampled_from(list(TOLERANCES)),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    closing=st.sampled_from(["none", "some", "all"]),
)
def test_partial_sums_match_the_twin(seed, shape, edges, sums, dtype, layout, closing):
    features, weights, is_open = draw_case(seed, shape, edges, dtype, layout, closing)
    sums = min(sums, edges)
    weights = torch.stack([(row + 1) * weights for row in range(sums)], 1) if sums else weights.new_empty(shape[0], 0, edges)
    opened = None if is_open is None else is_open[:, None].repeat(1, sums, 1)
    expected = [sum_by_sample(features, weights[:, row], is_open) for row in range(sums)]
    left = [feature.clone() for feature in features[sums:]]
    for form in (partial_sums, partial_sums_plain):
        own = [feature.clone() for feature in features]
        form(own, weights, opened)
        for found, wanted in zip(own, expected, strict=False):
            tolerance = TOLERANCES[dtype] * (sums + 1)
            torch.testing.assert_close(found.double(), wanted.reshape(shape), rtol=tolerance, atol=tolerance)
        for found, wanted in zip(own[sums:], left, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_no_samples_and_no_elements():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        features = [torch.ones(shape) for _ in range(3)]
        assert [total.shape for total in partial_sums(features, torch.ones(shape[0], 2, 3))] == [shape] * 2


def test_weights_that_do_not_fit_are_refused():
    features = [torch.ones(2, 3, 4, 4) for _ in range(2)]
    for weights in (torch.ones(2, 3, 2), torch.ones(2, 2, 3), torch.ones(2, 2)):
        with pytest.raises(RuntimeError, match="dgnet::partial_sums: 2 features need weights"):
            torch.ops.dgnet.partial_sums(features, weights, None)
    with pytest.raises(RuntimeError, match="is_open must be"):
        torch.ops.dgnet.partial_sums(features, torch.ones(2, 1, 2), torch.ones(2, 2, 2, dtype=torch.bool))


def test_the_operator_says_what_it_writes():
    features = tuple(torch.randn(2, 3, 4, 4) for _ in range(3))
    torch.library.opcheck(torch.ops.dgnet.partial_sums.default, (list(features), torch.rand(2, 2, 3), None))


@pytest.mark.parametrize("number", range(4, 12))
def test_a_complete_graph_holds_half(number):
    plan = module.find_plan(build_topology("complete", number))
    held = [node + 1 for node in range(plan.after + 1)]
    held += [len([j for j in plan.receivers if j >= node]) + node - plan.after - 1 for node in range(plan.after + 1, number)]
    assert max(held) == number // 2 or (number % 2 and max(held) == number // 2 + 1)


def test_no_plan_where_it_saves_nothing():
    assert module.find_plan(build_topology("chain", 8)) is None
    assert module.find_plan(build_topology("complete", 3)) is None
    # All nodes of the first half read the raw stage input: the features cannot go before the last of them has run.
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1:5, 0] = mask[5, 1:5] = True
    assert module.find_plan(Topology(mask, entry=(1, 2, 3, 4))) is None


OPTIONS = [
    {},
    {"topology": "er"},
    {"topology": "ws"},
    {"shortcut": "node"},
    {"weighting": "fixed"},
    {"weighting": "learned", "keep_edges": 2},
    {"weighting": "linear"},
    {"weighting": "signed"},
    {"node_gate": "hard"},
    {"node_gate": "hard", "gate_reads": "stage"},
]


@pytest.fixture
def even_small(monkeypatch):
    """Partial sums of small features too."""
    monkeypatch.setattr(module, "LEAST_BYTES", 0)


def build_pair(tiny, options, images):
    """A network with closed edges or gates, and the same with partial sums; how many of its stages have them."""
    network = tiny(layers=(6, 5, 5), **options).eval()
    if options.get("node_gate"):
        close_some_gates(network, images) if "gate_reads" not in options else None
    elif options.get("weighting", "routed") == "routed":
        close_some(network, images)
    elif options["weighting"] in ("linear", "signed"):
        draw_and_close(network)
    summed = copy.deepcopy(network)
    module.use_partial_sums(summed)
    return network, summed, sum(stage.inference_walk is not type(stage).inference_walk for stage in find_stages(summed))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "routed")
def test_partial_sums_change_nothing(even_small, tiny, options):
    images = torch.randn(16, 3, 16, 16)
    network, summed, number = build_pair(tiny, options, images)
    assert number >= 1
    torch.testing.assert_close(summed(images), network(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fewer_features_are_held(even_small, tiny):
    """While a node runs, a dense walk holds the features of all before it, this one half of them and what the node has read."""
    images = torch.randn(2, 3, 16, 16)
    network, summed, _ = build_pair(tiny, {"weighting": "fixed"}, images)
    most = []
    for each in (network, summed):
        stage, held, features = find_stages(each)[0], [], []
        for block in (stage.input, *stage.nodes):
            block.register_forward_pre_hook(
                lambda *_, held=held, features=features: held.append(sum(f() is not None for f in features))
            )
            block.register_forward_hook(lambda _, args, output, features=features: features.append(weakref.ref(output)))
        each(images)
        most.append(max(held))
    assert most == [6, 4 + 1]


@torch.no_grad()
def test_small_features_are_kept(tiny, monkeypatch):
    images = torch.randn(2, 3, 16, 16)
    _, summed, _ = build_pair(tiny, {}, images)
    calls = []
    monkeypatch.setattr(module, "partial_sums", lambda features, *_: calls.append(features))
    summed(images)
    assert calls == []


class Rank(RoutedWeighting):
    """Compares in-edges with each other."""

    def find_open(self, node: int, alpha: torch.Tensor, offset: float) -> torch.Tensor:
        return alpha >= alpha.mean(1, keepdim=True)


def test_stages_that_cannot_keep_partial_sums_keep_their_features(tiny):
    for options in ({"weighting": "softmax"}, {"weight_groups": 2}, {"weighting": Rank}, {"topology": "chain"}):
        network = tiny(**options).eval()
        assert not module.use_partial_sums(network)
        assert all(stage.inference_walk is type(stage).inference_walk for stage in find_stages(network))
    network = tiny().eval()
    for stage in find_stages(network)[:2]:
        stage.nodes[0].register_forward_hook(lambda *_: None)  # it may read the feature
    assert module.use_partial_sums(network)
    kept = [stage.inference_walk is type(stage).inference_walk for stage in find_stages(network)]
    assert kept == [True, True, False]


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet", "convnext", "swin", "vit"])
def test_converted_networks_of_each_layout(even_small, name):
    converted = dgnet.convert(build_static(name), node_gate="hard").eval()
    use_gates(converted)
    summed = copy.deepcopy(converted)
    assert module.use_partial_sums(summed)
    images = draw_images(name, 4)
    torch.testing.assert_close(summed(images), converted(images), rtol=1e-4, atol=1e-5)


class Skipping(nn.Module):
    """What the stage reads is read again behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Sequential(*(BasicBlock(8, 8) for _ in range(5)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        return (x + self.body(x)).mean((2, 3))


@torch.no_grad()
def test_the_input_of_a_stage_is_not_written_over(even_small):
    network = dgnet.convert(Skipping().eval(), image_size=10).eval()
    summed = copy.deepcopy(network)
    assert module.use_partial_sums(summed)
    images = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(summed(images), network(images))


def test_samples_that_share_memory_are_not_written_over():
    features = [torch.ones(1, 3, 4, 4).expand(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    with pytest.raises(RuntimeError, match="must not share memory"):
        partial_sums(features, torch.ones(2, 1, 2))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_network_writes_its_features_over(even_small, tiny):
    from torch._inductor.utils import run_and_get_code

    images = torch.randn(16, 3, 16, 16)
    network = tiny(layers=(4, 1, 1), node_gate="hard").eval()
    close_some_gates(network, images)
    logits, (code,) = run_and_get_code(compile_network(network), images)
    torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)
    assert code.count("torch.ops.dgnet.partial_sums.default(") == 1
    assert "clone" not in code
