"""The description of a dynamic network: figures, groups of static blocks, and the next command."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import timm
import torch
from torch import nn

import dgnet
from dgnet._cost import cost_model
from dgnet.errors import UsageError
from dgnet.files import to_json
from dgnet.models import remove_blocks


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "size"), [("test_convnext", 64), ("test_mambaout", 64), ("resnet18", 64)])
def test_figures_are_those_of_both_networks(name, size):
    static = timm.create_model(name)
    converted = dgnet.convert(static)
    found = dgnet.describe(converted, size)
    assert found.image_size == (size, size)
    assert [stage.name for stage in found.stages] == list(converted.graph_names)
    assert [stage.blocks for stage in found.stages] == [len(run.blocks) for run in converted.conversion.stages]
    assert [stage.edges for stage in found.stages] == [(n + 2) * (n + 1) // 2 for n in (stage.blocks for stage in found.stages)]
    assert (found.params, found.added_params) == (count(converted), count(converted) - count(static))
    assert found.added_params == sum(stage.added_params for stage in found.stages)
    assert found.multiply_adds == cost_model(converted, size).dense
    # With gates, as --budget adds them: nothing but what always runs.
    gated = dgnet.convert(static, node_gate="hard")
    costs = cost_model(gated, size)
    assert found.least_budget == pytest.approx(costs.least / costs.dense)
    assert set(found.gated) == set(gated.graph_names) - set(converted.graph_names)
    # The slow way: what is left of the static network without all these blocks, besides aggregation and routers.
    blocks = [block for run in gated.conversion.stages for block in run.blocks]
    bare = dgnet.cost(remove_blocks(static, blocks), size)
    left = (bare.multiply_adds + bare.linear_multiply_adds) / costs.dense
    assert left <= found.least_budget < left + 0.03


def test_shares_of_stages_add_up_to_what_need_not_run():
    found = dgnet.describe(dgnet.convert(timm.create_model("test_vit", img_size=32)))
    assert (found.image_size, found.gated) == ((32, 32), ())
    assert sum(stage.skippable for stage in found.stages) == pytest.approx(100 * (1 - found.least_budget))


def test_blocks_that_stay_static_are_grouped_by_the_reason():
    found = dgnet.describe(dgnet.convert(timm.create_model("resnet18")), 64)
    groups = {group.reason: group.blocks for group in found.static}
    assert groups["it changes the shape"] == ("layer2.0", "layer3.0", "layer4.0")
    single = "it is one block only, and has no gate"
    assert groups[single] == found.gated == ("layer2.1", "layer3.1", "layer4.1")
    text = str(found)
    assert f"static: layer2.1, layer3.1, layer4.1: {single}\n" in text
    assert text.splitlines()[0] == "DynamicResNet: 1 dynamic stage of 2 blocks"
    assert "2  BasicBlock" in text
    assert to_json(asdict(found), "utf-8")


def test_static_blocks_of_stages_that_are_no_containers_are_listed():
    found = dgnet.describe(dgnet.convert(timm.create_model("regnetx_002", num_classes=4)), 64)
    assert [(group.reason, group.blocks) for group in found.static] == [
        ("it changes the shape", ("s1.b1", "s2.b1", "s3.b1", "s4.b1"))
    ]


def test_one_block_is_called_so():
    converted = dgnet.convert(timm.create_model("resnet18"), stages="layer3", node_gate="hard", image_size=32)
    assert str(dgnet.describe(converted, 32)).startswith("DynamicResNet: 1 dynamic stage of 1 block\n")


def test_the_check_is_part_of_the_description():
    static = timm.create_model("test_convnext").eval()
    converted = dgnet.convert(static, check=torch.randn(2, 3, 64, 64))
    found = dgnet.describe(converted, 64)
    assert found.agreement is not None
    assert (found.agreement.images, found.agreement.same_class, found.agreement.top1) == (2, 100, None)
    assert found.agreement.difference < 1e-5
    assert "on 2 photos the logits differ from the static network's by at most" in str(found)
    labelled = replace(found, agreement=replace(found.agreement, top1=50.0, top1_static=25.0))
    assert "top-1 50.00 %, of the static network 25.00 %" in str(labelled)
    assert dgnet.describe(dgnet.convert(static), 64).agreement is None


def test_the_next_command_repeats_what_decides_the_network():
    static = timm.create_model("test_convnext")
    recipe = "--data DATA --optimizer adamw --lr 2e-4"
    command = dgnet.describe(dgnet.convert(static)).next_command
    assert command == f"dgnet train --model test_convnext --dynamic true --weights FILE --budget 0.7 {recipe}"
    options = {"weighting": "learned", "node_gate": "gumbel", "stages": ["stages.2"]}
    command = dgnet.describe(dgnet.convert(static, **options), 64, name="NAME", weights="a b").next_command
    kwargs = '{"node_gate": "gumbel", "stages": ["stages.2"]}'
    assert command == (
        f"dgnet train --model NAME --dynamic true --weights 'a b' --budget 0.87 {recipe} --image-size 64"
        f" --weighting learned --model-kwargs '{kwargs}'"
    )


def test_the_budget_of_the_next_command_can_be_reached():
    converted = dgnet.convert(timm.create_model("resnet18"), stages=["layer1"])
    found = dgnet.describe(converted)
    assert 0.7 < found.least_budget < 0.76
    assert "--budget 0.88 " in found.next_command


def test_networks_of_dgnet_are_described_too():
    network = dgnet.create_model("dg_resnet18")
    found = dgnet.describe(network, 64)
    static = dgnet.create_model("resnet18")
    # DG's stem differs from ResNet's: only what the stages add is compared.
    own = sum(count(stage.weighting) for stage in dgnet.graph.find_stages(network))
    assert found.added_params == own
    assert found.static == found.gated == ()
    assert "dgnet train --model dg_resnet18 --weights FILE" in found.next_command
    with pytest.raises(UsageError, match="ResNet has no dynamic stages"):
        dgnet.describe(static)
