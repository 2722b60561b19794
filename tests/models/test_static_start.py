"""A dynamic network that takes static weights starts as the static network, or the reason why it cannot is given."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import dgnet
from dgnet.checkpoint import load_weights
from dgnet.errors import UsageError
from dgnet.graph import record_connectivity
from dgnet.models import static_start_options
from dgnet.models._agreement import TOLERANCE
from dgnet.models._static_start import measure_difference
from tests.helpers.networks import build, shake_norms

STATIC = {
    "dg_resnet20": "resnet20",
    "dg_resnet18": "strided_resnet18",
    "dg_mobilenetv2_100": "mobilenetv2_100",
    "dg_regnety_006": "regnety_006",
}
QUICK = "dg_resnet20"
GIVEN = [
    {},
    {"node_gate": "hard"},
    {"gate": "alpha", "threshold": 0.02},
    {"weighting": "fixed"},
    {"weighting": "learned"},
    {"router_bias": 1.5, "router_norm": "none", "inference_weight": "gated"},
]


def trained(name: str) -> nn.Module:
    """A static network with the normalisation statistics of a trained one."""
    return shake_norms(build(name)).eval()


def built(name: str, **given: object) -> nn.Module:
    """A dynamic network with the options of the static start."""
    return dgnet.create_model(name, **static_start_options(build(name), given))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


CASES = [
    pytest.param(name, given, marks=[] if name == QUICK else pytest.mark.slow)
    for name in STATIC
    for given in GIVEN
    if name == "dg_mobilenetv2_100" or "node_gate" not in given
]


@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
def test_the_static_start_computes_what_the_static_network_does(name, given):
    static, dynamic = trained(STATIC[name]), built(name, **given)
    dgnet.load_static_weights(dynamic, static.state_dict(), start="static", image_size=64, weights_of=STATIC[name])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(dynamic.eval()(images), static(images)) < 1e-5
    # In training too, and the weights that both have get the same gradients. (Few values in a batch normalisation enlarge
    # what float32 rounds.)
    static.double().train(), dynamic.double().train()
    found, expected = dynamic(images.double()), static(images.double())
    assert relative(found.detach(), expected.detach()) < 1e-9
    found.square().mean().backward()
    expected.square().mean().backward()
    first = static.pretrained_cfg["first_conv"] + ".weight"
    assert relative(dynamic.get_parameter(first).grad, static.get_parameter(first).grad) < 1e-7


def test_every_router_gets_a_gradient_from_the_first_step():
    """Also those of the edges that start at 0: a chain need not stay one."""
    dynamic = built(QUICK)
    dgnet.load_static_weights(dynamic, trained("resnet20").state_dict(), start="static")
    dynamic.train()(torch.randn(4, 3, 32, 32)).square().mean().backward()
    with record_connectivity(dynamic) as record:
        dynamic.eval()(torch.randn(1, 3, 32, 32))
    for stage, adjacency in zip(dynamic.stages, record.adjacency, strict=True):
        chain = torch.ones_like(adjacency).tril(-1).triu(-1)
        torch.testing.assert_close(adjacency, chain, rtol=0, atol=1e-6)
        largest = max(router.bias.grad.abs().max() for router in stage.weighting.routers.values())
        for router in stage.weighting.routers.values():
            assert (router.bias.grad.abs() > 1e-6 * largest).all()
            assert router.weight.grad.any()


@pytest.mark.slow
def test_a_projection_that_a_static_network_lacks_starts_at_0_and_learns():
    dynamic = built("dg_mobilenetv2_100")
    untrained = dgnet.load_static_weights(dynamic, trained("mobilenetv2_100").state_dict(), start="static", image_size=64)
    assert "blocks.1.input.0.weight" in untrained  # its convolution stays as initialised
    assert "blocks.1.input.1.weight" not in untrained  # its γ was set to 0
    dynamic.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for stage in dynamic.stages:
        if isinstance(stage.input, nn.Sequential):
            assert not stage.input[1].weight.any()
            assert not stage.input[1].bias.any()
            assert stage.input[1].weight.grad.any()


def test_a_converted_network_always_starts_as_the_static_one(tmp_path):
    static = trained("resnet18")
    converted = dgnet.convert(build("resnet18"))
    dgnet.load_static_weights(converted, static.state_dict(), start="static")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(converted.eval()(images), static(images)) < 1e-5
    with pytest.raises(UsageError, match="a converted network always starts as the static one"):
        static_start_options(converted, {})
    torch.save(static.state_dict(), tmp_path / "resnet18.pth")
    assert load_weights(dgnet.convert(build("resnet18")), "resnet18", tmp_path / "resnet18.pth", "paper", (64, 64)).loss == ""


def test_options_that_contradict_are_refused():
    network = build(QUICK)
    for given, message in [
        ({"shortcut": "edge"}, "needs shortcut='node', got 'edge'; leave shortcut out, or use start 'paper'"),
        ({"topology": "residual"}, "needs topology='complete', got 'residual'"),
        ({"topology": "complete", "weighting": "fixed"}, "needs topology='chain', got 'complete'"),
        ({"router_std": 0.01}, "needs router_std=0.0, got 0.01"),
        ({"weighting": "learned", "learned_start": 0.5}, "needs learned_start=1.0, got 0.5"),
        (
            {"node_gate": "hard"},
            r"a closed gate would cut it: leave out gates and --budget, .* \(dgnet.convert, --dynamic true\)",
        ),
    ]:
        with pytest.raises(UsageError, match=message):
            static_start_options(network, given)
    for static in (build("resnet20"), build("randwire_small_ws", num_blocks=6, channels=8)):
        with pytest.raises(UsageError, match=f"{type(static).__name__} does not: leave it out"):
            static_start_options(static, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"logits differ by .* build it with shortcut='node', router_start='chain', unit_start=True, router_std=0.0"),
        # What earlier versions could do at best: every edge that starts closed weighs 0.0003.
        ({"shortcut": "node", "router_start": "chain", "gate": "alpha", "router_bias": 8.0}, "differ by .* unit_start=True"),
        ({"start": True, "threshold": 0.97}, "leave out the options of thresholds and gates"),
    ],
    ids=str,
)
def test_a_network_that_computes_something_else_is_refused_and_left_unchanged(options, message):
    given = {name: value for name, value in options.items() if name != "start"}
    dynamic = built(QUICK, **given) if "start" in options else build(QUICK, **given)
    before = copy.deepcopy(dynamic.state_dict())
    with pytest.raises(UsageError, match=message):
        dgnet.load_static_weights(dynamic, trained("resnet20").state_dict(), start="static")
    after = dynamic.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UsageError, match="unknown start 'lossless'; allowed: paper, static"):
        dgnet.load_static_weights(dynamic, trained("resnet20").state_dict(), start="lossless")


def test_a_resnet_with_a_max_pool_is_refused(tmp_path):
    static = timm.create_model("resnet18", num_classes=3)
    dynamic = built("dg_resnet18", num_classes=3)
    with pytest.raises(
        UsageError, match=r"stage 1 has stride 2 where a ResNet has a max-pool in its stem; make .* dgnet.convert"
    ):
        dgnet.load_static_weights(dynamic, static.state_dict(), start="static")
    path = tmp_path / "resnet18.pth"
    torch.save(static.state_dict(), path)
    refusal = "dg_resnet18 cannot start as the static network: .* use --model resnet18 --dynamic true, or --start paper"
    with pytest.raises(UsageError, match=refusal):
        load_weights(dynamic, "dg_resnet18", path, "static", (64, 64))
    assert "--model resnet18 --dynamic true keeps it" in load_weights(dynamic, "dg_resnet18", path, "paper", (64, 64)).loss


def test_the_papers_start_says_what_it_loses(tmp_path):
    path = tmp_path / "resnet20.pth"
    torch.save(trained("resnet20").state_dict(), path)
    loss = load_weights(build(QUICK), QUICK, path, "paper", (32, 32)).loss
    assert loss.startswith("this start does not keep the function of the static network (its logits differ by ")
    assert loss.endswith(" % of the largest, on random images); --start static keeps it")
    static = build(QUICK, topology="chain", weighting="fixed", shortcut="node")
    assert load_weights(static, QUICK, path, "paper", (32, 32)).loss == ""
    # The projections that only the static network needs were not built.
    chain = build(QUICK, topology="chain", weighting="fixed")
    assert "its logits are others" in load_weights(chain, QUICK, path, "paper", (32, 32)).loss
    torch.save(build(QUICK).state_dict(), path)
    with pytest.raises(UsageError, match=r"needs the weights of a static network, and .* has others; leave out --start"):
        load_weights(build(QUICK), QUICK, path, "static", (32, 32))


def test_the_check_changes_neither_the_network_nor_the_random_numbers():
    dynamic = build(QUICK, node_gate="gumbel").train()
    before, state = copy.deepcopy(dynamic.state_dict()), torch.random.get_rng_state()
    assert measure_difference(dynamic, 32) > TOLERANCE
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dynamic.state_dict().items())
    assert all(module.training for module in dynamic.modules())
