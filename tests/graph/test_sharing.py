"""The backward pass of features that several sums read. The twin is autograd of the loop over edges, which keeps features."""

from __future__ import annotations

import gc
import threading
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dgnet.compat.torch import find_tensors
from dgnet.graph import aggregate, aggregate_by_loop
from dgnet.graph._sharing import Sharing
from tests.helpers.twins import TOLERANCES

backward = torch.ops.dgnet.aggregate_backward.default
forward = torch.ops.dgnet.aggregate.default


def share():
    """`aggregate` in a forward pass of its own."""
    return partial(aggregate, sharing=Sharing())


def twin():
    return lambda features, weights, is_open=None: aggregate_by_loop(features, weights, is_open)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(found, expected, dtype=torch.float64):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


class Stage:
    """Nodes that each read all earlier ones. `inputs`: what needs gradients."""

    def __init__(self, seed: int, nodes: int = 4, dtype=torch.float64, fixed: bool = False, closing: bool = True) -> None:
        self.x = draw(seed, 3, 4, 2, 5).to(dtype).requires_grad_()
        exact = dtype if dtype == torch.float64 else torch.float32
        self.weights = [draw(seed + node, 3, node).to(exact).requires_grad_(not fixed) for node in range(1, nodes + 1)]
        closed = [closing and node % 2 == 0 for node in range(1, nodes + 1)]
        self.opened = [draw(seed - node, 3, node + 1) > -0.5 if some else None for node, some in enumerate(closed)]
        self.inputs = [self.x] if fixed else [self.x, *self.weights]

    def run(self, form) -> Tensor:
        features = [self.x * 1.5]
        for weights, is_open in zip(self.weights, self.opened, strict=True):
            features.append(torch.tanh(form(features, weights, is_open)))
        return features[-1]

    def gradients(self, form, **options) -> tuple[Tensor, ...]:
        output = self.run(form)
        return torch.autograd.grad(output, self.inputs, torch.ones_like(output), **options)


class Blocks(nn.Module):
    """Three blocks that end with a batch normalisation and read all features before theirs, with learned weights."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4)) for _ in range(3))
        self.weights = nn.ParameterList(torch.randn(5, node + 1) for node in range(3))
        for block in self.blocks:
            nn.init.normal_(block[1].weight)
            nn.init.normal_(block[1].bias)
        self.double()
        self.features: list[StorageWeakRef] = []

    def forward(self, x: Tensor, form, call=lambda block, x: block(x)) -> Tensor:
        features = [x]
        for block, weights in zip(self.blocks, self.weights, strict=True):
            features.append(call(block, torch.relu(form(features, weights))))
        self.features = [StorageWeakRef(feature.untyped_storage()) for feature in features[1:-1]]
        return features[-1].square()  # keeps the last one

    def gradients(self, output: Tensor) -> list[Tensor]:
        self.zero_grad()
        output.sum().backward(retain_graph=True)
        return [parameter.grad.clone() for parameter in self.parameters() if parameter.requires_grad]

    def state(self) -> list[Tensor]:
        return [value.clone() for value in self.buffers()]


IMAGES = draw(1, 5, 4, 6, 7)


def run_twin(make=Blocks) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients and the statistics if all features are kept."""
    network = make()
    return network.gradients(network(IMAGES, twin())), network.state()


# Gradients of features


@given(
    seed=st.integers(10, 2**31),
    nodes=st.integers(1, 6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    fixed=st.booleans(),
    closing=st.booleans(),
)
def test_gradients_match_the_twin(seed, nodes, dtype, fixed, closing):
    stage = Stage(seed, nodes, dtype, fixed, closing)
    assert_close(stage.gradients(share()), stage.gradients(twin()), dtype)


def test_half_precision_is_no_less_exact_than_the_twin():
    stage, exact = Stage(10, 5, torch.bfloat16), Stage(10, 5)
    exact.x.data = stage.x.detach().double()
    for one, other in zip(exact.weights, stage.weights, strict=True):
        one.data = other.detach().double()
    found, other, wanted = stage.gradients(share()), stage.gradients(twin()), exact.gradients(twin())
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, *[torch.float32] * 5]
    for one, two, right in zip(found, other, wanted, strict=True):
        assert (one.double() - right).norm() <= 1.2 * (two.double() - right).norm() + 1e-3 * right.norm()


class Calls(TorchDispatchMode):
    """Counts sums, and the gradient maps that the operator writes."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.written = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.sums += function == forward
        if function == backward:
            self.written += sum(args[5])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fixed", [True, False])
def test_the_backward_pass_writes_one_map_for_each_node_not_for_each_edge(fixed):
    stage = Stage(10, 5, fixed=fixed)
    output = stage.run(share())
    with Calls() as calls:
        output.sum().backward()
    assert (calls.sums, calls.written) == (5, 0)  # 15 edges, from five nodes


def test_a_graph_can_be_run_backward_again_in_part_and_by_several_threads():
    stage = Stage(11)
    output = stage.run(share())
    expected = stage.gradients(twin())
    run = partial(torch.autograd.grad, output, grad_outputs=torch.ones_like(output), retain_graph=True)
    for _ in range(2):
        assert_close(run(inputs=stage.inputs), expected)
    # A pass that needs no gradient of a feature leaves nothing for the next.
    assert_close(run(inputs=stage.weights[-1:]), expected[-1:])
    assert_close(run(inputs=stage.inputs), expected)
    found = []
    threads = [threading.Thread(target=lambda: found.extend(run(inputs=stage.inputs) for _ in range(20))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    for gradients in found:
        assert_close(gradients, expected)


def test_a_backward_pass_within_another():
    def run(form):
        x, weights = draw(3, 2, 3, 4, 4).requires_grad_(), draw(4, 2, 1)
        feature = x * 2
        first, second = form([feature], weights), form([feature], weights)
        inner, total = [], second.sum()
        first.register_hook(lambda grad: inner.extend(torch.autograd.grad(total, x, retain_graph=True)))
        (outer,) = torch.autograd.grad((first * second).sum(), x, retain_graph=True)
        return outer, *inner

    assert_close(run(share()), run(twin()))


def test_gradients_of_gradients_match_the_twin():
    def second(form):
        stage = Stage(12, 3)
        total = sum((gradient.square().sum() for gradient in stage.gradients(form, create_graph=True)), torch.zeros(()))
        return torch.autograd.grad(total, stage.inputs)

    assert_close(second(share()), second(twin()))


def test_many_gradients_at_once_match_the_twin():
    def batched(form):
        stage = Stage(13)
        output = stage.run(form)
        return torch.autograd.grad(output, stage.inputs, draw(4, 7, *output.shape), is_grads_batched=True)

    assert_close(batched(share()), batched(twin()))


def test_features_without_gradients_leaves_and_a_feature_twice():
    def run(form):
        x, leaf = draw(5, 2, 3, 4, 4).requires_grad_(), draw(6, 2, 3, 4, 4).requires_grad_()
        weights, feature, constant = draw(7, 2, 5).requires_grad_(), x.exp(), draw(8, 2, 3, 4, 4)
        first = form([feature, constant, feature, leaf, x], weights)
        second = form([constant, first.sin(), leaf, first, x], weights)
        return torch.autograd.grad(second.square().sum(), [x, leaf, weights])

    assert_close(run(share()), run(twin()))


def test_views_of_one_memory_are_features_of_their_own():
    def run(form):
        x, weights = draw(5, 3, 4, 4, 4).requires_grad_(), draw(7, 3, 3).requires_grad_()
        norm = nn.BatchNorm2d(4).double()
        feature = norm(x)
        total = form([feature, feature.transpose(2, 3), feature[:1].expand_as(feature)], weights)
        return torch.autograd.grad(total.square().sum() + form([feature], feature[:, :1, 0, 0]).sum(), [x, weights])

    assert_close(run(share()), run(twin()))


def test_a_feature_that_changes_in_place_between_two_sums():
    def run(form):
        x, weights = draw(5, 3, 4, 4, 4).requires_grad_(), draw(7, 3, 1)
        feature = x * 1.0
        first = form([feature], weights)
        feature.mul_(3)
        second = form([feature], weights)
        feature[:, :2].mul_(2)
        return torch.autograd.grad((first + second + form([feature], weights)).sum(), x)

    assert_close(run(share()), run(twin()))


def test_features_of_several_precisions():
    def run(form):
        x, weights = draw(5, 3, 4, 4, 4).float().requires_grad_(), draw(7, 3, 2)
        one, other = x * 1.1, (x * 1.3).bfloat16()
        total = form([other, one], weights.float()).float() + form([one, other], weights.float())
        return torch.autograd.grad(total.sin().sum(), x)

    assert_close(run(share()), run(twin()), torch.bfloat16)


def test_gradients_have_the_layout_of_the_features():
    x = draw(5, 2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    seen = []
    feature = x * 1.0
    feature.register_hook(seen.append)
    share()([feature], draw(7, 2, 1).requires_grad_()).mean((2, 3)).sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_what_lies_behind_a_closed_edge_reaches_no_gradient():
    x, weights = draw(8, 3, 4, 2, 2).requires_grad_(), draw(9, 3, 3).requires_grad_()
    is_open = torch.tensor([[True, False, True]] * 3)
    form = share()
    feature = x * 2
    total = form([feature, feature + torch.inf, feature * 3], weights, is_open)
    # A gradient that is infinite, behind an edge that is closed.
    broken = form([feature], weights[:, 1:2], torch.zeros(3, 1, dtype=torch.bool)) * torch.inf
    by_x, by_weights = torch.autograd.grad([total.sum(), broken.sum()], [x, weights])
    assert total.isfinite().all()
    assert by_x.isfinite().all()
    assert by_weights.isfinite().all()
    assert (by_weights[:, 1] == 0).all()


def test_nothing_is_left_of_a_pass():
    """Also with a graph of the backward pass, of which a reference cycle in autograd's graph would never be collected."""
    for inputs in ("x", "weights"):
        x, weights = draw(5, 2, 3, 4, 4).requires_grad_(), [draw(7, 2, 1).requires_grad_() for _ in range(2)]
        form = share()
        feature = nn.BatchNorm2d(3).double()(x)
        output = form([feature], weights[0]).sin() * form([feature], weights[1])
        kept = StorageWeakRef(output.untyped_storage())
        gradients = torch.autograd.grad(output.square().sum(), x if inputs == "x" else weights[0], create_graph=True)
        del output, gradients, feature, form
        gc.collect()
        assert kept.expired()


# Features that are not kept


@pytest.mark.parametrize("training", [True, False])
def test_normalised_features_are_not_kept_and_gradients_stay(training):
    network = Blocks().train(training)
    output = network(IMAGES, share())
    assert [feature.expired() for feature in network.features] == [True, True]
    expected, statistics = run_twin(lambda: Blocks().train(training))
    assert_close(network.gradients(output), expected, torch.float32)
    assert_close(network.gradients(output), expected, torch.float32)
    assert_close(network.state(), statistics)  # the backward pass does not count as one


class Maps(TorchDispatchMode):
    """The operators that make maps of the size of `IMAGES`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        maps = [one for one in find_tensors(result) if one.numel() == IMAGES.numel()]
        self.made += [function.name()] * len(maps)
        return result


def test_the_backward_pass_makes_no_normalised_feature():
    """It makes a gradient for each node, and one for each rectifier."""
    network = Blocks()
    output = network(IMAGES.clone().requires_grad_(), share())
    with Maps() as maps:
        output.sum().backward()
    assert maps.made.count("dgnet::aggregate") == 3
    assert {name for name in maps.made if "norm" in name or "addcmul" in name} == {"aten::native_batch_norm_backward"}


def make_frozen() -> Blocks:
    network = Blocks()
    network.blocks[0][1].requires_grad_(False)
    return network


def make_half_frozen() -> Blocks:
    network = Blocks()
    network.blocks[0][1].bias.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("make", "expired"),
    [
        (partial(Blocks, partial(nn.GroupNorm, 2)), [False, False]),
        (make_frozen, [False, True]),
        (make_half_frozen, [False, True]),
    ],
    ids=["another normalisation", "frozen", "frozen bias"],
)
def test_other_features_are_kept(make, expired):
    network = make()
    output = network(IMAGES, share())
    assert [feature.expired() for feature in network.features] == expired
    assert_close(network.gradients(output), run_twin(make)[0], torch.float32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_run_as_often_as_with_the_twin(reentrant):
    def run(form):
        network, calls = Blocks(), []

        def call(block, x):
            return checkpoint(lambda x: calls.append(0) or block(x), x, use_reentrant=reentrant)

        network.zero_grad()
        network(IMAGES, form, call).sum().backward()
        return [parameter.grad for parameter in network.parameters()] + network.state(), len(calls)

    found, expected = run(share()), run(twin())
    assert_close(found[0], expected[0], torch.float32)
    assert found[1] == expected[1] == 6


def test_a_checkpointed_network_keeps_nothing():
    network = Blocks()
    output = checkpoint(lambda x: network(x, share()), IMAGES.clone().requires_grad_(), use_reentrant=False)
    assert [feature.expired() for feature in network.features] == [True, True]
    network.zero_grad()
    output.sum().backward()
    assert_close([parameter.grad for parameter in network.parameters()], run_twin()[0], torch.float32)


def test_hooks_of_others_on_saved_tensors():
    for context in (save_on_cpu(), torch.autograd.graph.disable_saved_tensors_hooks("not here")):
        network = Blocks()
        with context:
            output = network(IMAGES, share())
        assert_close(network.gradients(output), run_twin()[0], torch.float32)


def test_gradients_of_gradients_of_normalised_features():
    def second(form):
        network = Blocks()
        parameters = list(network.parameters())
        first = torch.autograd.grad(network(IMAGES, form).sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters)

    assert_close(second(share()), second(twin()), torch.float32)


@pytest.mark.parametrize("what", ["input of the norm", "another feature", "weights", "weight of the norm"])
def test_a_change_in_place_is_an_error_as_elsewhere(what):
    x, weights, norm = draw(5, 3, 4, 4, 4).requires_grad_(), draw(7, 3, 2).requires_grad_(), nn.BatchNorm2d(4).double()
    read, other, scaled = x * 1.0, x * 2.0, weights * 1.0
    total = share()([norm(read), other], scaled)
    changed = {"input of the norm": read, "another feature": other, "weights": scaled, "weight of the norm": norm.weight}
    with torch.no_grad():
        changed[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()


def test_what_may_change_between_the_passes_may():
    """Statistics, and a bias, which no gradient depends on."""

    def run(form):
        x, weights, norm = draw(5, 3, 4, 4, 4).requires_grad_(), draw(7, 3, 1).requires_grad_(), nn.BatchNorm2d(4).double()
        norm(draw(3, 9, 4, 4, 4))
        total = form([norm.eval()(x)], weights)
        norm.train()(draw(4, 9, 4, 4, 4))
        with torch.no_grad():
            norm.bias.add_(1)
        return torch.autograd.grad(total.square().sum(), [weights])

    assert_close(run(share()), run(twin()))


def test_a_graph_that_was_run_backward_already():
    def run(form):
        x, weights, norm = draw(5, 3, 4, 4, 4).requires_grad_(), draw(7, 3, 1).requires_grad_(), nn.BatchNorm2d(4).double()
        feature = norm(x)
        feature.sum().backward()
        return torch.autograd.grad(form([feature], weights).square().sum(), [weights])

    assert_close(run(share()), run(twin()))


def test_meta_tensors():
    network = Blocks().to("meta")
    network(IMAGES.to("meta"), share()).sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in network.parameters())
