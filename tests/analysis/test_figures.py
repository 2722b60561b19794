"""Figures: how many cells and arrows they have, where these lie, and what they say."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

import dgnet
from dgnet.analysis.figures import (
    Curve,
    GraphRow,
    draw_class_distance,
    draw_class_means,
    draw_curves,
    draw_edges,
    draw_graphs,
    draw_points,
    save_figure,
)
from dgnet.analysis.statistics import list_edges
from dgnet.errors import UsageError
from tests.conftest import close_some


@pytest.fixture
def record(tiny):
    network = tiny()
    images = torch.randn(6, 3, 12, 10)
    close_some(network, images)
    with torch.no_grad(), dgnet.record_connectivity(network) as record:
        network(images)
    return record


def panels(figure: Figure) -> list:
    """The axes of stages."""
    return [axes for axes in figure.axes if "stage " in axes.get_title() + axes.get_label()]


def arrows(axes) -> list[FancyArrowPatch]:
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


def words(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return "\n".join(texts)


def test_importing_dgnet_does_not_import_matplotlib_nor_drawing_what_trains():
    code = "import dgnet, sys; assert 'matplotlib' not in sys.modules; dgnet.plot_graph; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    with pytest.raises(AttributeError, match="no attribute 'plot_nothing'"):
        dgnet.plot_nothing  # noqa: B018


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


def test_classes(record):
    edges = list_edges(record.topology)
    names = [f"class {label}" for label in range(6)]
    figure = draw_class_means(torch.randn(6, 30), names, edges, [5, 5, 5])
    (axes,) = [axes for axes in figure.axes if axes.images]
    assert axes.images[0].get_array().shape == (6, 30)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert (labels[0], labels[9]) == ("in→1", "3→out")
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [text.get_text() for text in axes.texts] == ["stage 1", "stage 2", "stage 3"]
    figure = draw_class_distance(torch.rand(6, 6), names)
    (axes,) = [axes for axes in figure.axes if axes.images]
    assert len(axes.texts) == 30
    assert "RMS difference" in words(figure)
    many = draw_class_distance(torch.rand(50, 50), [str(label) for label in range(50)])
    assert "class, in the order of its label" in words(many)


def test_points_by_class_and_by_number():
    points, labels = torch.randn(40, 2), torch.arange(40) % 4
    figure = draw_points(points, [0.6, 0.3], labels, list("abcd"), torch.rand(40), "cost")
    by_class, by_number = figure.axes[:2]
    assert [len(collection.get_offsets()) for collection in by_class.collections] == [10, 1] * 4  # images, their mean
    assert len(by_number.collections[0].get_offsets()) == 40
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list("abcd")
    assert "60 % of the variance" in words(figure)
    without = draw_points(points, [0.6, 0.3], torch.full((40,), -100), [], torch.rand(40), "cost")
    assert not without.legends


def test_curves():
    curves = [Curve("a", [1, 2, 3], [3.0, 2.0, 1.0], [3], [71.5]), Curve("b", [1, 2], [2.5, 2.0], [], [])]
    figure = draw_curves(curves)
    (losses,) = figure.axes  # no curve of top-1: it was evaluated once
    assert [list(line.get_ydata()) for line in losses.lines] == [[3.0, 2.0, 1.0], [2.5, 2.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a, top-1 71.50 %", "b"]
    curves.append(Curve("c", [1, 2], [2.0, 1.0], [1, 2], [50.0, 60.0]))
    _, top1 = draw_curves(curves).axes
    assert list(top1.lines[2].get_ydata()) == [50.0, 60.0]


def test_files_are_whole_png_and_svg_with_edges_by_name(record, tmp_path):
    figure = dgnet.plot_graph(record)
    (tmp_path / "graph.png").write_bytes(b"older")
    paths = save_figure(figure, tmp_path, "graph")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.png", "graph.svg"]
    with Image.open(paths[0]) as picture:
        assert picture.size[0] > 700
    tree = ElementTree.parse(paths[1])
    names = [element.get("id", "") for element in tree.iter()]
    assert len([name for name in names if name.startswith("image0-stage1-edge")]) == 10
    assert "stage 1" in {element.text for element in tree.iter()}  # text stays text
    again = tmp_path / "again"
    again.mkdir()
    assert save_figure(figure, again, "graph")[1].read_bytes() == paths[1].read_bytes()


def test_dollars_in_a_name_are_no_formula(record, tmp_path):
    row = GraphRow([matrix[0] for matrix in record.adjacency], caption=r"a $\frac$ b")
    _, path = save_figure(draw_graphs([row], [topology.mask for topology in record.topology]), tmp_path, "graph")
    assert r"a $\frac$ b" in path.read_text(encoding="utf-8")
