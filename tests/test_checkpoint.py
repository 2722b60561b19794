"""What a file of weights is, and how it differs from a network, without a command line."""

import pickle

import pytest
import torch
from torch import nn

import dgnet
from dgnet.checkpoint import load_state, read_tensors
from dgnet.errors import UsageError


class Attack:
    def __reduce__(self):
        return (print, ("run",))


def write_zip(content, path):
    torch.save(content, path)


def write_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle])
@pytest.mark.parametrize("content", [{"weight": Attack()}, nn.Linear(1, 1)], ids=["a call", "a module"])
def test_a_file_with_pickled_code_is_told_from_a_damaged_one(write, content, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    write(content, path)
    with pytest.raises(UsageError, match="carries pickled code and was not loaded"):
        read_tensors(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_file_that_is_cut_off_is_truncated_at_any_length(write, tmp_path):
    path = tmp_path / "weights.pth"
    write({"weight": torch.ones(3)}, path)
    whole = path.read_bytes()
    assert read_tensors(path)[0]["weight"].tolist() == [1, 1, 1]
    for length in {*range(0, len(whole) - 8, 37), len(whole) - 8}:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="is truncated or no checkpoint"):
            read_tensors(path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, ""),
        ({"fc.bias": None}, "it lacks fc.bias"),
        ({"fc.bias": None, "conv1.weight": None}, "it lacks conv1.weight and 1 more"),
        ({"fc2.bias": torch.zeros(1)}, "it also holds fc2.bias"),
        ({"fc.bias": torch.zeros(3)}, "fc.bias has the shape (3,), not (10,)"),
    ],
)
def test_the_first_difference_is_named(change, difference):
    network = dgnet.create_model("dg_resnet20")
    state = {**network.state_dict(), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    assert load_state(network, state) == difference


def test_a_stage_of_other_edges_is_named():
    network, other, drawn, redrawn = (
        dgnet.create_model("dg_resnet32", **options)
        for options in (
            {},
            {"topology": "chain"},
            {"topology": "er", "weighting": "fixed"},
            {"topology": "er", "weighting": "fixed", "topology_seed": 1},
        )
    )
    assert load_state(network, other.state_dict()) == "layer1 has other edges"
    assert load_state(drawn, redrawn.state_dict()) == "layer1 has other edges"
    assert load_state(drawn, drawn.state_dict()) == ""
