from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F

from dgnet._cost import cost_model
from dgnet.analysis._explorer_page import (
    collect,
    describe_exploration,
    quantise,
    render_explorer,
    shorten_names,
    write_explorer,
)
from dgnet.analysis._sweep import OFFSETS
from dgnet.data import decode
from dgnet.errors import UsageError
from dgnet.graph import record_connectivity
from dgnet.inference import set_mode, set_threshold_offset
from tests.helpers.data import CLASSES, Pictures


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [3, 7])
def test_figures_equal_a_dense_run_of_each_image_at_each_offset(tiny, batch_size):
    network = tiny(node_gate="hard", node_gate_bias=0.3)
    data = Pictures([0, 1, 2, 3, 4, 0, None])
    found = collect(network, data, batch_size=batch_size)
    assert found.offsets == OFFSETS
    assert found.labels == [0, 1, 2, 3, 4, 0, None]
    assert found.class_names == CLASSES
    costs = cost_model(network, (12, 12))
    assert found.dense_multiply_adds == costs.dense
    set_mode(network, "dense")
    for number, offset in enumerate(OFFSETS):
        set_threshold_offset(network, offset)
        for image, label in enumerate(found.labels):
            with record_connectivity(network) as record:
                logits = network(data.tensor(image))[0]
            assert int(found.predictions[image, number]) == int(logits.argmax())
            assert float(found.confidences[image, number]) == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)
            if label is None:
                assert found.losses[image, number].isnan()
            else:
                loss = F.cross_entropy(logits, torch.tensor(label))
                assert float(found.losses[image, number]) == pytest.approx(float(loss), abs=1e-4)
            executed = costs.executed(record.ran, [matrix != 0 for matrix in record.adjacency])
            assert int(found.executed[image, number]) == int(executed[0])
            weights = [
                float(matrix[0, j, i]) for matrix, edges in zip(record.adjacency, found.edges, strict=True) for i, j in edges
            ]
            torch.testing.assert_close(found.weights[image, number].tolist(), weights, atol=1e-5, rtol=0)
            assert [weight != 0 for weight in weights] == (found.weights[image, number] != 0).tolist()
    assert len(found.executed[:, 5].unique()) > 1  # not a trivial case
    assert found.executed[:, 0].min() > found.executed[:, -1].max()


def test_images_are_spread_over_the_data_set(tiny):
    found = collect(tiny(), Pictures([0, 1, 2, 3, 4, 0, 1, 2, 3, 4]), images=4, offsets=[0.0])
    assert found.labels == [0, 2, 0, 2]
    assert decode(found.thumbnails[1], "thumbnail").size == (12, 12)


def test_the_network_is_left_without_an_offset(tiny):
    network = tiny(node_gate="hard")
    collect(network, Pictures([0]))
    assert {stage.threshold_offset for stage in network.stages} == {0}


def test_a_networks_own_offset_is_run_and_stays(tiny):
    network = tiny(node_gate="hard", node_gate_bias=0.3, threshold_offset=0.25)
    data = Pictures([0, 1, 2])
    found = collect(network, data)
    assert found.own_offset == 0.25
    assert found.offsets == tuple(sorted({*OFFSETS, 0.25}))
    assert network.stages[0].threshold_offset == 0.25
    with torch.no_grad(), record_connectivity(network) as record:
        network(torch.cat([data.tensor(image) for image in range(3)]))
    executed = cost_model(network, (12, 12)).executed(record.ran, [matrix != 0 for matrix in record.adjacency])
    assert found.executed[:, found.offsets.index(0.25)].tolist() == pytest.approx(executed.tolist())
    assert describe_exploration(found, "tiny", "")["own_offset"] == 0.25


def test_what_cannot_be_explored(tiny, tmp_path):
    data = Pictures([0, 1])
    with pytest.raises(UsageError, match="no edge or block that can close"):
        collect(tiny(weighting="fixed"), data)
    with pytest.raises(UsageError, match="no dynamic stages"):
        collect(torch.nn.Flatten(), data)
    with pytest.raises(UsageError, match="holds no images"):
        collect(tiny(), Pictures([]))
    with pytest.raises(UsageError, match="--images must be at least 1, got 0"):
        collect(tiny(), data, images=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_explorer(tiny(), data, tmp_path / "file" / "explorer.html")


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.0, 0.3], [0.002, 0.7, 0.0, 0.6999, 0.31], [-1.5, 0.0, 2.0, 1e-9]])
def test_quantised_weights_are_as_near_as_promised(weights):
    codes, least, greatest = quantise(torch.tensor(weights))
    for code, weight in zip(codes.tolist(), weights, strict=True):
        assert (code == 0) == (weight == 0)
        if code:
            assert least + (code - 1) * (greatest - least) / 254 == pytest.approx(weight, abs=(greatest - least) / 508 + 1e-7)


def test_names_lose_the_folders_that_all_share():
    assert shorten_names(["/a/b/c/1.jpg", "/a/b/d/1.jpg"]) == ["c/1.jpg", "d/1.jpg"]
    assert shorten_names(["/a/b/1.jpg"]) == ["1.jpg"]
    assert shorten_names(["/a/cat/1.jpg", "/a/catfish/1.jpg"]) == ["cat/1.jpg", "catfish/1.jpg"]
    assert shorten_names(["digits, image 1", "digits, image 2"]) == ["digits, image 1", "digits, image 2"]


def test_whatever_names_hold_the_page_has_two_scripts_and_gives_the_data_back(tiny, tmp_path):
    data = Pictures([0, 1, 2, 3, 4, 0])
    found = collect(tiny(), data)
    described = describe_exploration(found, "{{data}}</title><script>", "{{title}}</script>")
    page = render_explorer(described)
    assert page.count("</script>") == page.count("<script") == 2
    document = re.search(r'<script id="data" type="application/json">(.*)</script>\n<script>', page)
    assert json.loads(document[1]) == json.loads(json.dumps(described))
    assert "somebody" not in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing to load; that is the name of a namespace
    path = write_explorer(tiny(), data, tmp_path / "new" / "explorer.html", model="dg_tiny")
    assert "<title>dg_tiny: connectivity explorer</title>" in path.read_text(encoding="utf-8")
