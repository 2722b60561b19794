"""Pictures of classes, points and curves: what they show and what they say."""

from __future__ import annotations

import torch

from dgnet.analysis._plots import Curve, draw_class_distance, draw_class_means, draw_curves, draw_points
from dgnet.analysis._statistics import list_edges
from tests.helpers.figures import words


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
