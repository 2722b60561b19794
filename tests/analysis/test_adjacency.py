"""Pictures of adjacency: how many cells and arrows they have, where these lie, and what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import dgnet
from dgnet.analysis._adjacency import GraphRow, draw_edges, draw_graphs
from dgnet.analysis._figures import SIGNED, WEIGHTS, WeightColours, save_figure
from dgnet.errors import UsageError
from tests.helpers.figures import arrows, panels, words


@pytest.mark.parametrize("show", ["mean", "std", "open"])
def test_heat_maps_have_a_cell_an_edge(record, show):
    figure = dgnet.plot_adjacency(record, show)
    assert isinstance(figure, Figure)
    for axes, matrix, topology in zip(panels(figure), record.adjacency, record.topology, strict=True):
        shown = axes.images[0].get_array()
        assert shown.count() == topology.num_edges
        assert [label.get_text() for label in axes.get_xticklabels()] == ["in", "1", "2", "3"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3", "out"]
        expected = {"mean": matrix.mean(0), "std": matrix.std(0, correction=0), "open": 100 * (matrix != 0).float().mean(0)}[
            show
        ]
        cells = {(row + 1, column): shown[row, column] for row, column in np.argwhere(~shown.mask).tolist()}
        assert cells.keys() == {tuple(cell) for cell in topology.mask.nonzero().tolist()}
        for (receiver, sender), value in cells.items():
            assert value == pytest.approx(float(expected[receiver, sender]), abs=1e-5)
        assert len(axes.texts) == topology.num_edges
    label = {"mean": "mean weight of an edge", "std": "standard deviation", "open": "images for which an edge is open, %"}[show]
    assert label in words(figure)
    assert "(6 images)" in words(figure)


def test_one_images_weights_as_heat_maps(record):
    figure = dgnet.plot_adjacency(record, image=4)
    assert panels(figure)[1].images[0].get_array()[3, 0] == pytest.approx(float(record.adjacency[1][4, 4, 0]))
    assert "weight of an edge, image 4" in words(figure)


@pytest.mark.parametrize("image", [0, 5])
def test_graphs_have_an_arrow_an_edge_and_all_point_forward(record, image):
    figure = dgnet.plot_graph(record, image, torch.rand(3, 12, 10))
    opened = closed = dead = 0
    for axes, matrix, topology in zip(panels(figure), record.adjacency, record.topology, strict=True):
        weights = matrix[image]
        largest = max(float(stage[image].max()) for stage in record.adjacency)
        assert len(arrows(axes)) == topology.num_edges
        for arrow in arrows(axes):
            *_, edge, receiver, state = arrow.get_gid().replace("edge", "").split("-")
            sender, receiver = int(edge), int(receiver)
            assert sender < receiver
            places = arrow.get_path().vertices[:, 0]  # along the line, then the head
            assert places[0] == pytest.approx(sender, abs=0.4)
            assert places.max() == pytest.approx(receiver, abs=0.4)
            weight = float(weights[receiver, sender])
            assert (state == "open") == (weight != 0)
            if weight:
                opened += 1
                assert arrow.get_linewidth() == pytest.approx(1.9 * weight / largest)
                assert arrow.get_linestyle() in ("-", "solid")
            else:
                closed += 1
                assert arrow.get_linestyle() in (":", "dotted")
        names = [text.get_text() for text in axes.texts]
        assert names == ["in", "1", "2", "3", "out", axes.get_label()]
        faint = [text.get_text() for text in axes.texts if text.get_color() != "black"]
        assert faint == [str(node) for node in range(1, 4) if not weights[node].any()]
        dead += len(faint)
    assert min(opened, closed) > 0  # not a trivial case
    assert "closed edge" in words(figure)
    assert "weight of an open edge" in words(figure)
    assert len([axes for axes in figure.axes if axes.images]) == 1  # the picture


def test_some_image_has_a_block_that_does_not_run(record):
    assert any((~matrix[:, 1:-1].bool().any(2)).any() for matrix in record.adjacency)


def test_what_was_not_recorded(record, tiny):
    for plot in (dgnet.plot_adjacency, dgnet.plot_graph):
        with pytest.raises(UsageError, match="image 6 was not recorded: the record holds 6, 0 to 5"):
            plot(record, image=6)
        with pytest.raises(UsageError, match="expected an adjacency"):
            plot([torch.zeros(3)])
    with pytest.raises(UsageError, match="image 3 was not recorded: the record holds 1"):
        dgnet.plot_adjacency([torch.ones(5, 3, 3).tril(-1), torch.ones(3, 3).tril(-1)], image=3)
    with pytest.raises(UsageError, match="unknown show 'spread'; allowed: mean, std, open"):
        dgnet.plot_adjacency(record, "spread")
    with pytest.raises(UsageError, match="nothing was recorded"), dgnet.record_connectivity(tiny()) as empty:
        dgnet.plot_graph(empty)


def test_matrices_will_do_without_a_record(record):
    for matrices in (record.adjacency, [matrix[0] for matrix in record.adjacency]):
        assert len(arrows(panels(dgnet.plot_graph(matrices))[0])) == 10


def test_pictures_of_all_kinds(record):
    picture = Image.new("RGB", (10, 12), (255, 0, 0))
    for kind in (picture, np.asarray(picture), torch.ones(3, 12, 10)):
        (axes,) = [axes for axes in dgnet.plot_graph(record, 0, kind).axes if axes.images]
        assert axes.images[0].get_array().shape == (12, 10, 3)


def test_a_notebook_shows_a_figure(record):
    assert dgnet.plot_adjacency(record)._repr_png_().startswith(b"\x89PNG")


def test_many_nodes_stages_and_a_weight_all_the_same(tmp_path):
    masks = [torch.ones(size, size, dtype=torch.bool).tril(-1) for size in (25, 3, 4, 5, 6)]
    matrices = [mask.double() for mask in masks]
    figure = draw_edges(matrices, masks, "weight")
    assert [len(axes.texts) for axes in panels(figure)] == [0, 3, 6, 10, 15]  # numbers only where they fit
    assert len([axes for axes in figure.axes if axes.axison]) == 6  # stages and the colours; the rest of the row is empty
    assert len(arrows(panels(draw_graphs([GraphRow(matrices)], masks))[0])) == 300
    closed = draw_graphs([GraphRow([matrix * 0 for matrix in matrices])], masks)
    save_figure(closed, tmp_path, "closed")  # no weight to scale colours by
    assert all("closed" in arrow.get_gid() for arrow in arrows(panels(closed)[0]))


def test_weights_of_both_signs_have_two_hues_and_a_small_negative_one_has_none():
    mixed = WeightColours.of(torch.tensor([-0.5, 0.2, 1.0]))
    assert (mixed.name, mixed.norm.vmin, mixed.norm.vmax) == (SIGNED, -1.0, 1.0)
    assert "negative" in mixed.meaning
    red, _, blue = mixed(0.8)[:3]
    assert red > blue
    red, _, blue = mixed(-0.8)[:3]
    assert blue > red
    for weight in (-1e-3, 1e-3):  # a line is never white
        assert min(mixed.line(weight)[:3]) < 0.8
    positive = WeightColours.of(torch.tensor([-0.02, 0.2, 1.0]))
    assert (positive.name, positive.norm.vmax) == (WEIGHTS, 1.0)
