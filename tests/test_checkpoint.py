"""What a file of weights is, and how it differs from a network, without a command line."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dgnet
from dgnet.checkpoint import load_state, read_tensors
from dgnet.errors import UsageError
from dgnet.models import match_names


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


def test_the_content_of_a_file_decides_how_it_is_read(tmp_path):
    state = {"weight": torch.ones(2)}
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.safetensors")
    torch.save({"net": state, "epoch": 3}, tmp_path / "c.pth")
    for name in ("a.pth", "b.safetensors", "c.pth"):
        found, carried = read_tensors(tmp_path / name)
        assert (list(found), carried) == (["weight"], None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a.pth is empty; copy it again"),
        (
            b"version https://git-lfs",
            "a.pth is text, not a checkpoint: it begins with 'version https://git-lfs'; copy it again",
        ),
        (b"PK\x03\x04\0\0", "a.pth is truncated or no checkpoint; copy it again"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(content, expected, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for folder, advice in ((tmp_path, ""), (tmp_path / "checkpoints", ", or use another, such as checkpoints/best.ckpt")):
        (folder / "a.pth").write_bytes(content)
        with pytest.raises(UsageError) as error:
            read_tensors(folder / "a.pth")
        assert str(error.value) == f"{folder}/{expected}{advice}"


def test_a_prefix_before_all_names_is_that_of_an_attribute():
    own = {"conv.weight": 0, "fc.bias": 0}
    for prefix in ("model.", "backbone.", "lit.net."):
        assert match_names({f"{prefix}{name}": 1 for name in own}, own).keys() == own.keys()
    for other in ({"model.other": 1, "model.conv": 1}, {"model.conv.weight": 1, "fc.bias": 1}, {"a": 1}, {}):
        assert match_names(other, own) is other


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_file_that_is_cut_off_is_truncated_at_any_length(write, tmp_path):
    path = tmp_path / "weights.pth"
    write({"weight": torch.ones(3)}, path)
    whole = path.read_bytes()
    assert read_tensors(path)[0]["weight"].tolist() == [1, 1, 1]
    for length in {*range(0, len(whole) - 8, 37), len(whole) - 8}:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="is truncated or no checkpoint" if length else "is empty"):
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
