"""The classifier of trained weights on data with the same classes, in the same order or in another."""

from __future__ import annotations

import pytest
import torch
from timm.data import ImageNetInfo

from dgnet.data import imagenet_classes
from dgnet.models import create_model
from dgnet.training import settle_head


def build(classes: int = 3):
    return create_model("resnet20", num_classes=classes, channels=(4, 4, 4)).eval()


@pytest.mark.parametrize(
    ("own", "known", "order", "line"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2], "kept the classifier of 3 classes"),
        (["a", "b", "c"], None, [0, 1, 2], "kept the classifier of 3 classes"),
        (["a", "b", "c"], ["c", "a", "b"], [1, 2, 0], "kept the classifier of 3 classes, in the order of the data's"),
        (
            ["a", "b", "c"],
            ["a", "b", "x"],
            [0, 1, 2],
            "kept the classifier of 3 classes, which were not called as the data's are ('c' is not one of them)",
        ),
    ],
)
def test_the_outputs_of_a_kept_classifier_follow_the_classes_of_the_data(own, known, order, line):
    network, images = build(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = network(images)
        assert settle_head(network, [], own, known) == line
        torch.testing.assert_close(network(images), before[:, order])


def test_imagenets_synsets_keep_its_classifier():
    known, synsets = imagenet_classes(1000), ImageNetInfo().label_names()
    network, images = build(1000), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = network(images)
        assert settle_head(network, [], synsets, known) == "kept the classifier of 1,000 classes"
        torch.testing.assert_close(network(images), before)
        assert settle_head(network, [], synsets[::-1], known).endswith("in the order of the data's")
        torch.testing.assert_close(network(images), before.flip(1))


def test_a_classifier_of_other_classes_is_reset():
    line = settle_head(build(), ["fc.weight", "fc.bias"], ["a", "b", "c"], None)
    assert line == "trained for other classes; reset fc.weight, fc.bias to 3 classes"
