"""Mistakes of all commands that classify: one line each, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest

from dgnet.cli import COMMANDS
from dgnet.cli.command import Command
from dgnet.cli.network_options import NETWORK_OPTIONS, as_typed
from dgnet.errors import did_you_mean
from dgnet.models._factory import _conversion_options
from dgnet.typed import describe
from tests.helpers.command import list_commands, refuse


def test_all_options_of_networks_are_known_to_the_command_line():
    assert set(NETWORK_OPTIONS) == set(_conversion_options())


def test_the_dashes_of_an_option_do_not_make_it_similar():
    assert did_you_mean("--node-gate", ["--decay-rate"]) == ""
    assert did_you_mean("--node-gat", ["--decay-rate", "--node-gate"]) == "; did you mean '--node-gate'?"


def test_a_message_names_options_as_they_are_typed():
    message = "stages='auto', node_gate='hard' (dynamic=True); epochs=3 and b='x y' stay, also f(gate='alpha')x"
    assert as_typed(message, ["--dynamic"], has_dict=False).startswith("stages='auto', node_gate='hard' (--dynamic true);")
    expected = "--model-kwargs.stages auto, --node-gate hard (dynamic=True); epochs=3 and b='x y' stay,"
    assert as_typed(message, ["--node-gate"], has_dict=True).startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train --modle x", "unknown option --modle; did you mean '--model'?"),
        ("train --aa rand-m9", "unknown option --aa; here it is --auto-augment; options: dgnet train --help"),
        ("train --node-gate hard", "unknown option --node-gate; here it is --model-kwargs.node_gate; options: dgnet train"),
        ("train -b 64", "unknown option -b; here it is --batch-size"),
        ("train --model_ema", "unknown option --model_ema; here it is --ema"),
        ("train --num-classes 10", "unknown option --num-classes; it is not needed here: leave it out"),
        ("train --opt-betas 0.9 0.99", "--opt-betas must be a list of numbers"),
        ("train extra", "unrecognized arguments: extra"),
        ("train --model dg_resnt20", "unknown model 'dg_resnt20'; did you mean 'dg_resnet20'?"),
        ("train --model resnet20 --weighting fixed", "resnet20 is static and has no option 'weighting'; use dg_resnet20"),
        ("train --model resnet18 --weighting fixed", "resnet18 is static and has no option 'weighting'; use dg_resnet18"),
        ('train --model resnet18 --model-kwargs {"foo":1}', "resnet18 has no option 'foo'"),
        ('train --model-kwargs {"layers":[1,1,1]}', "dg_resnet20 cannot be built with"),
        ('train --model-kwargs {"channels":[4]}', "channels must be a list of 3 whole numbers, got [4]"),
        ('train --model-kwargs {"channels":"444"}', "channels must be a list of 3 whole numbers, got '444'"),
        ('train --model-kwargs {"channels":[4,0,4]}', "channels must be 1 to 10000, got 0"),
        ("train --lr 1e300", "--lr must be 0 to 1000000, got 1e+300"),
        ("bench dg_resnet20 --image-size 999999999", "--image-size must be 1 to 10000, got 999999999"),
        ("train --nodes 2", "--nodes 2 needs a launcher, torchrun or srun"),
        (f"train --checkpoint-every {'9' * 400}minutes", "--checkpoint-every must be at most 1,000,000,000 steps or minutes"),
        ("train --max-pixels 0", "--max-pixels must be above 0"),
        ('train --loggers [{"class_path":"a.B","init_args":5}]', "--loggers takes {class_path: …, init_args: {…}}, got"),
        ('train --loggers [{"class_path":"os.system"}]', "os.system cannot be built: it is not a Lightning logger"),
        ("train --model-kwargs.zero_init_last maybe", "zero_init_last must be true or false or null, got 'maybe'"),
        ('train --model-kwargs {"drop_rate":2}', "drop_rate must be 0 to 1, got 2"),
        ('train --model-kwargs {"router":"x"}', "router must be a class or callable, got 'x'"),
        ('train --model-kwargs {"router_std":-1}', "router_std must be at least 0, got -1"),
        ("train --output FILE/sub", "the run folder FILE/sub cannot be written: Not a directory"),
        ("train --output FILE", "--output FILE is a file"),
        ("train --weighting foo", "unknown weighting 'foo'; allowed: routed, signed, linear, softmax, learned, fixed"),
        ('train --model-kwargs {"router_bas":1}', "has no option 'router_bas'; did you mean 'router_bias'?"),
        ('train --model-kwargs {"num_classes":3}', "cannot set num_classes: it follows from the data"),
        ("train --epochs 0", "--epochs must be at least 1, got 0"),
        ("train --epochs many", "--epochs must be a whole number, got 'many'"),
        ("train --batch-size -1", "--batch-size must be at least 1"),
        ("train --batch-size 100000", "is more than the 1442 training images"),
        ("train --seed 5000000000", "--seed must be 0 to 4294967295"),
        ("train --warmup-epochs 30 --epochs 10", "--warmup-epochs must be 0 to 10, got 30"),
        ("train --evaluate-every 3 --epochs 10", "--evaluate-every 3 leaves out the last of 10 epochs; use a divisor"),
        ("train --holdout -1", "--holdout must be at least 0, got -1"),
        ("train --holdout 5000", "--holdout 5000 leaves none of the 1442 training images; hold out fewer"),
        ("train --holdout 5 --val-data digits", "--holdout replaces --val-data; leave one of them out"),
        (
            "train --cache true --workers 1",
            "--cache true needs --devices 1, --nodes 1, --workers 0 and another --augment than rrc",
        ),
        (
            "train --cache true --image-size 96",
            "--cache true needs --augment pad-crop, reflect-crop or none; images of (96, 96) use rrc",
        ),
        ("train --data a-{0..4.tar", "cannot be expanded"),
        ("train --data ${NOT_SET}/a-{0..4}.tar", "cannot be expanded"),
        ("train --lr inf", "--lr must be a number, got 'inf'"),
        ("train --lr 0x10", "--lr must be a number, got '0x10'"),
        ("train --epochs 010", "--epochs must be a whole number, got '010'"),
        ("train --epochs 1_0", "--epochs must be a whole number, got '1_0'"),
        ("train --model-kwargs.router_bias 010", "router_bias must be a number, got '010'"),
        ("train --image-size 2.5", "--image-size must be a whole number or null, got 2.5"),
        ("train --budget nan", "--budget must be a number or null, got 'nan'"),
        ("train --budget-warmup -1", "--budget-warmup must be 0 to 1, got -1.0"),
        ("train --epochs " + "9" * 400, "is out of range, allowed are 64 bits"),
        ("train --clip-grad 0", "--clip-grad must be above 0, got 0"),
        ("train --optimizer foo", "unknown --optimizer 'foo'; 1"),
        ("train --precision fp16 --accelerator cpu", "--precision fp16 needs a GPU, and this run is on a CPU; use bf16 or 32"),
        ("train --lr.x 3", "unknown option --lr.x; --lr takes a number"),
        ("train --model-kwargs.a.b 3 --model-kwargs.a.b.c 5", "--model-kwargs.a.b is 3, which has no entry c"),
        ("train --lr 0", "--lr must be above 0"),
        ("train --hflip 2", "--hflip must be 0 to 1, got 2"),
        ("train --precision fp8", "unknown --precision 'fp8'"),
        ("train --optimizer sdg", "unknown --optimizer 'sdg'; did you mean 'sgd'?"),
        ("train --optimizer adahessian", "--optimizer adahessian needs second derivatives"),
        ("train --accelerator tpuu", "unknown --accelerator 'tpuu'"),
        ("train --accelerator cpu --devices 0,1", "--devices 0,1 are not different GPUs of this machine"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        ("train --batch-size 9 --accumulate 2", "--batch-size 9 cannot be divided by --accumulate 2"),
        ("train --ema 1", "--ema must be below 1"),
        ("train --epoch-images 9", "--epoch-images is for streams"),
        ("train --sync-bn true --accelerator cpu", "--sync-bn needs CUDA devices"),
        ("train --checkpoint-every sometimes", "--checkpoint-every must be like '500 steps'"),
        ("train --on-bad-image ignore", "unknown --on-bad-image 'ignore'"),
        ("train --loggers [{name:x}]", "--loggers"),
        ("train --resume nowhere", "nowhere is not a run folder"),
        ("train --data nowhere", "data source 'nowhere' does not exist"),
        ("train --data no-{0..1}.tar --val-data digits", "no-0.tar does not exist"),
        ("train --weights nowhere.ckpt", "nowhere.ckpt does not exist"),
        ("evaluate nowhere", "nowhere does not exist"),
        ("evaluate", "checkpoint"),
        ("predict nowhere x.jpg", "nowhere does not exist"),
        ("train --model dla34 --grad-checkpointing true", "dla34 has no gradient checkpointing; leave out"),
        ("cost --table 6", "unknown --table '6'; allowed: 1, 2, 4, 5"),
        ("cost dg_resnet5", "unknown model 'dg_resnet5'"),
        ("cost dg_resnet18 --image-size 0 3", "at least 1 pixel"),
        ("cost vit_tiny_patch16_224 --image-size 32 32", "cannot take an image of 32×32"),
        ("cost --image-size 3", "expected 2 arguments"),
    ],
)
def test_mistakes_end_in_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert expected in refuse(capsys, *arguments.split())
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]  # nothing was begun


def list_options() -> list[tuple[list[str], str, Any]]:
    """(words of the command, option, type) for each option of each command that takes a value."""
    found = []
    for words in list_commands(COMMANDS):
        entry: Any = COMMANDS[words[0]]
        for word in words[1:]:
            entry = entry.commands[word]
        if isinstance(entry, Command):
            parser = entry.build()
            found += [(words, option, hint) for option, hint in parser.hints.items()]
    return found


OPTIONS = list_options()
IDS = [" ".join([*words, option]) for words, option, _ in OPTIONS]


@pytest.mark.parametrize(("words", "option", "hint"), OPTIONS, ids=IDS)
def test_every_option_refuses_an_empty_value(words, option, hint, capsys):
    line = refuse(capsys, *words, f"{option}=")
    assert line.startswith(f"dgnet: {option} must ") or "is needed" in line or "expected 2 arguments" in line
    assert any(words in line for words in ("got ''", "must not be empty", "is needed", "expected 2 arguments"))


@pytest.mark.parametrize(("words", "option", "hint"), OPTIONS, ids=IDS)
def test_every_option_for_a_path_expands_the_home_folder(words, option, hint, capsys):
    takes_path = "path" in describe(hint)
    is_called_so = option.removeprefix("--") in PATHS and (*words, option) not in NO_PATHS
    assert takes_path == is_called_so, "add the option to PATHS, and give it the type Location"
    if takes_path:
        line = refuse(capsys, *words, f"{option}=~nobody-has-this-name/x")
        assert "there is no such home folder" in line


PATHS = {
    "check",
    "evaluation",
    "to",
    "class-names",
    "data",
    "val-data",
    "data-root",
    "images",
    "val-images",
    "weights",
    "latency-table",
    "output",
    "write",
    "curves",
    "config",
    "resume",
}
NO_PATHS = {("experiment", "similarity", "--images")}
"""Options that are called like a path elsewhere."""
