"""Networks load what timm, Lightning and wrappers write, through timm's own code."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.models import load_checkpoint, save_for_hf
from torch import Tensor, nn

import dgnet
from dgnet.checkpoint import load_state, load_weights
from dgnet.errors import UsageError
from dgnet.models import unwrap_names
from tests.helpers.networks import build, build_meta

NETWORKS = {
    "dg_resnet20": {"channels": (4, 6, 8), "topology": "er"},
    "dg_resnet18": {},
    "dg_mobilenetv2_100": {"node_gate": "hard"},
    "dg_regnety_006": {},
    "randwire_small_ws": {"num_blocks": 6, "channels": 8},
    "resnet20": {"channels": (4, 6, 8)},
    "strided_resnet18": {},
}
QUICK = ("dg_resnet20", "randwire_small_ws", "resnet20")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
BUILDERS = [timm.create_model, dgnet.create_model]
by_each_builder = pytest.mark.parametrize("create", BUILDERS, ids=["timm", "dgnet"])
State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def halved(state: State) -> State:
    return {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


FILES: dict[str, tuple[str, Callable[[State], dict[str, object]]]] = {
    "a state dict": ("w.pth", lambda state: state),
    "safetensors": ("w.safetensors", lambda state: state),
    "DataParallel": ("w.pth", lambda state: prefixed("module.", state)),
    "torch.compile": ("w.safetensors", lambda state: prefixed("_orig_mod.", state)),
    "timm's training": (
        "last.pth.tar",
        lambda state: {"state_dict": prefixed("module._orig_mod.", state), "args": argparse.Namespace(lr=0.1), "epoch": 3},
    ),
    "averaged weights": ("last.pth.tar", lambda state: {"state_dict": halved(state), "state_dict_ema": state, "metric": 0.5}),
    "dgnet train": ("last.ckpt", lambda state: {"state_dict": prefixed("network.", state), "epoch": 3}),
}


def write(folder: Path, kind: str, state: State) -> str:
    name, content = FILES[kind]
    path = folder / name
    save_file(content(state), path) if path.suffix == ".safetensors" else torch.save(content(state), path)
    return str(path)


def assert_holds(network: nn.Module, state: State) -> None:
    own = network.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


def other(name: str) -> nn.Module:
    """A network with other weights than a new one."""
    network = build(name, num_classes=7, **NETWORKS[name])
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor)
    return network


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", EACH)
def test_a_file_loads_by_every_way(name, kind, tmp_path):
    state = other(name).state_dict()
    path = write(tmp_path, kind, state)
    options = {"num_classes": 7, **NETWORKS[name]}
    for create in BUILDERS:
        assert_holds(create(name, checkpoint_path=path, **options), state)
        overlay = {"file": path, "num_classes": 7}
        assert_holds(create(name, pretrained=True, pretrained_cfg_overlay=overlay, **options), state)
    network = dgnet.create_model(name, **options)
    load_checkpoint(network, path)
    assert_holds(network, state)
    network = dgnet.create_model(name, **options)
    load_weights(network, name, path)
    assert_holds(network, state)
    resized = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**options, "num_classes": 4})
    heads = {n for n in state if n.startswith(resized.pretrained_cfg["classifier"])}
    assert all(torch.equal(t, state[n]) for n, t in resized.state_dict().items() if n not in heads)


@by_each_builder
@pytest.mark.parametrize("name", EACH)
def test_a_folder_that_timm_wrote_loads(name, create, tmp_path):
    written = other(name).eval()
    save_for_hf(written, tmp_path, model_args=NETWORKS[name])  # older versions of timm do not note the arguments
    source, state = f"local-dir:{tmp_path}", written.state_dict()
    assert_holds(create(source, pretrained=True), state)
    untrained = create(source, pretrained=False).state_dict()
    assert not torch.equal(untrained[next(iter(state))], next(iter(state.values())))
    assert create(source, pretrained=True, num_classes=4).num_classes == 4
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = create(source, pretrained=True, features_only=True).eval()(images)
        for feature, expected in zip(features, written.forward_intermediates(images, intermediates_only=True), strict=True):
            torch.testing.assert_close(feature, expected)
        grey = create(source, pretrained=True, in_chans=1).eval()
        conv = written.pretrained_cfg["first_conv"]
        torch.testing.assert_close(grey.get_submodule(conv).weight, written.get_submodule(conv).weight.sum(1, keepdim=True))


def test_a_configuration_may_carry_the_weights_themselves():
    state = other("dg_resnet20").state_dict()
    cfg = {"state_dict": dict(state), "num_classes": 7, "classifier": "fc", "first_conv": "conv1"}
    assert_holds(timm.create_model("dg_resnet20", pretrained=True, pretrained_cfg=cfg, **NETWORKS["dg_resnet20"]), state)


def test_weights_of_another_random_graph_are_refused(tmp_path):
    path = write(tmp_path, "timm's training", other("dg_resnet20").state_dict())
    options = {"channels": (4, 6, 8), "topology": "er", "topology_seed": 5, "num_classes": 7}
    with pytest.raises(RuntimeError, match="has other edges"):
        timm.create_model("dg_resnet20", checkpoint_path=path, **options)
    with pytest.raises(UsageError, match="Error\\(s\\) in loading state_dict"):
        dgnet.create_model("dg_resnet20", checkpoint_path=path, **options)


def test_timms_own_networks_load_a_run_through_dgnet(tmp_path):
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    path = write(tmp_path, "dgnet train", state)
    assert_holds(dgnet.create_model("resnet18", num_classes=7, checkpoint_path=path), state)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dg_resnet20", {"checkpoint_path": "missing.pth"}, "no such file"),
        ("dg_resnet20", {"pretrained": True, "pretrained_cfg_overlay": {"file": "missing.pth"}}, "missing.pth, which does not"),
        ("local-dir:missing", {"pretrained": True}, "there is no such folder"),
        ("local-dir:", {}, "names no network"),
        ("hf-hub:", {}, "names no network"),
        ("dg_resnet20.unknown", {}, "unknown"),
        (None, {}, "by its name, got None"),
        (5, {}, "by its name, got 5"),
        (b"dg_resnet20", {}, "by its name"),
        ("", {}, "unknown model ''"),
        ("dg_resnet20\0", {}, r"did you mean 'dg_resnet20'"),
        ("dg_resnet20\n", {}, r"did you mean 'dg_resnet20'"),
        ("x" * 5000, {}, "unknown model 'xxx"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_cannot_be_built_is_answered_in_one_line(name, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        dgnet.create_model(name, **options)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_the_list_of_models_can_be_filtered():
    assert dgnet.list_models("dg_resnet5?") == ["dg_resnet50", "dg_resnet56"]
    assert dgnet.list_models() == dgnet.list_models("*")
    for bad in (None, 5, ["dg_*"]):
        with pytest.raises(UsageError, match="a pattern such as"):
            dgnet.list_models(bad)


BAD_STATES = [{1: torch.ones(1)}, {b"conv1.weight": torch.ones(1)}, {"fc.bias": None}, {"layer1.mask": 3}, {"network.a": [1]}]


@pytest.mark.parametrize("state", BAD_STATES, ids=str)
@pytest.mark.parametrize("name", ["dg_resnet20", "resnet20", "dg_regnety_006", "strided_resnet18", "randwire_small_ws"])
def test_a_state_that_is_none_is_refused_in_one_line(name, state):
    network = build_meta(name)
    with pytest.raises(UsageError, match="a state dict"):
        network.load_state_dict(state)
    assert "a state dict" in load_state(network, state)


def test_names_are_unwrapped_only_if_all_carry_the_prefix():
    one = torch.ones(1)
    assert list(unwrap_names({"module.network.a": one, "module.network.b": one})) == ["a", "b"]
    for state in ({"module.a": one, "b": one}, {"layer.module.a": one}, {}):
        assert unwrap_names(state) is state


def test_randwire_drops_paths():
    network = dgnet.create_model("randwire_small_ws", num_blocks=5, channels=4, drop_path_rate=0.2)
    rates = [module.drop_prob for module in network.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.2 * block / 14 for block in range(1, 15)])
    for bad in (-0.1, 1.5, "x"):
        with pytest.raises(UsageError, match="drop_path_rate must be"):
            timm.create_model("randwire_small_ws", drop_path_rate=bad)
    torch.manual_seed(0)
    plain = dgnet.create_model("randwire_small_ws", num_blocks=5, channels=4)
    torch.manual_seed(0)
    assert_holds(dgnet.create_model("randwire_small_ws", num_blocks=5, channels=4, drop_path_rate=0.2), plain.state_dict())
