"""Options of a network as words of `dgnet train`: those with which a file of weights fits."""

from __future__ import annotations

import json
import shlex

import pytest
import timm

import dgnet
from dgnet.models import as_words, create_model, missing_options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ""),
        ({"weighting": "learned"}, "--weighting learned"),
        ({"weighting": "fixed", "node_gate": "hard"}, """--weighting fixed --model-kwargs '{"node_gate": "hard"}'"""),
        ({"stages": ["layer1"], "router_bias": 4.0}, """--model-kwargs '{"router_bias": 4.0, "stages": ["layer1"]}'"""),
    ],
)
def test_only_options_that_are_no_defaults_are_typed(options, expected):
    static = timm.create_model("test_resnet", layers=(2, 2, 1, 1))
    stored = dgnet.convert(static, **options).stored_options()
    words = as_words(missing_options(stored))
    assert shlex.join(words) == f"--dynamic true {expected}".strip()
    assert missing_options(stored, static) == missing_options(stored)
    assert missing_options(stored, dgnet.convert(static, **options)) == {}


def test_options_that_differ_from_those_of_a_network():
    network = create_model("dg_resnet20", channels=[4, 4, 4], weighting="learned")
    stored = {"channels": [4, 4, 4], **create_model("dg_resnet20", channels=[4, 4, 4]).stored_options()}
    assert as_words(missing_options(stored, network)) == ["--weighting", "routed", "--model-kwargs", '{"channels": [4, 4, 4]}']
    edges = create_model("dg_resnet20", channels=[4, 4, 4], topology="er").stored_options()
    *_, name, value = as_words(missing_options(edges))
    assert name == "--model-kwargs"
    assert json.loads(value)["topology"] == edges["topology"]
    assert as_words({"img_size": 64, "dynamic": True}) == ["--dynamic", "true", "--image-size", "64"]
