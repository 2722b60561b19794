"""Strategies for inputs of each kind. A new command or option is covered: they are taken from the parsers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis.strategies import (
    SearchStrategy,
    booleans,
    composite,
    floats,
    integers,
    just,
    lists,
    one_of,
    sampled_from,
    text,
    tuples,
)

from dgnet.cli import COMMANDS
from dgnet.cli.command import Command, Group
from dgnet.compat.argparse import option_strings
from tests.fuzz import values
from tests.fuzz.bases import QUICK
from tests.fuzz.judge import Input

Draw = Callable[[SearchStrategy[Any]], Any]

WORDS = one_of(sampled_from(values.TEXTS), sampled_from(values.PATHS), text(max_size=8), integers().map(str), floats().map(str))
TRAIN = ["train", *QUICK, "--epochs", "1", "--output", "@box@/made"]
STARTS = {
    "train": [*TRAIN[1:], "--data", "@data@"],
    "evaluate": ["@run@"],
    "predict": ["@run@", "@image@"],
    "analyze": ["--curves", "@run@", "--output", "@box@/made"],
    "export": ["@run@/nothing"],  # an export that succeeds takes half a minute
    "explore": ["@run@/nothing"],  # a page that is served never ends
    "bench": ["dg_none"],
    "cost": ["dg_resnet20"],
    "doctor": ["nothing"],  # it may compile for half a minute
    "detect train": ["--data", "@ann@", "--images", "@images@", "--val-data", "@ann@", "--model", "dg_resnet20"],
    "detect evaluate": ["@res@", "--data", "@ann@"],
    "detect predict": ["@run@", "@image@"],
}
"""Words with which a command runs, quickly. A command that is not listed begins with no words."""

PROCESSES = {"--workers", "--devices", "--nodes", "--threads"}
"""Options that start as many processes or threads as they say: large numbers of them are left out."""

SLOW = {"--compile", "--speed"}
"""Options that take minutes."""


@cache
def commands() -> dict[str, tuple[str, ...]]:
    """The options of each command, by its words."""
    found = {}

    def walk(entries: Any, before: str) -> None:
        for word, entry in entries.items():
            if isinstance(entry, Group):
                walk(entry.commands, f"{before}{word} ")
            elif isinstance(entry, Command):
                found[before + word] = tuple(name for name in option_strings(entry.build()) if name not in SLOW)

    walk(COMMANDS, "")
    return found


@composite
def command_lines(draw: Draw) -> Input:
    """Options of every command with all kinds of values, forms and repetitions."""
    name = draw(sampled_from(sorted(commands())))
    words = [*name.split(), *STARTS.get(name, [])]
    for _ in range(draw(integers(1, 3))):
        option = draw(sampled_from(commands()[name]))
        if option in ("-h", "--help") and draw(integers(0, 4)):
            continue
        is_special = option in values.SPECIAL and draw(booleans())
        value = draw(sampled_from(values.SPECIAL[option])) if is_special else draw(WORDS)
        if option in PROCESSES:
            value = _few(value.strip())
        form = draw(sampled_from(["apart", "apart", "apart", "joined", "joined", "alone", "short", "dotted", "twice", "front"]))
        given = {
            "apart": [option, value],
            "joined": [f"{option}={value}"],
            "alone": [option],
            "short": [option[: max(4, len(option) // 2)], value],
            "dotted": [f"{option}.{draw(sampled_from(['x', 'layers', '1', '', 'a.b', 'é']))}", value],
            "twice": [option, value, option, draw(WORDS)],
            "front": [],
        }
        words += given[form]
        if form == "front":
            words[1:1] = [option, value]
    if draw(integers(0, 9)) == 0:
        words.insert(draw(integers(0, len(words))), draw(WORDS))
    return Input("command", words)


def _few(value: str) -> str:
    """A number of processes that a test may start."""
    is_many = len(value) > 1 and value.lstrip("+-").isdigit() and len(value) < 12
    return "3" if is_many else value


BYTES = one_of(
    tuples(just("flip"), floats(0, 1), integers(0, 7)),
    tuples(just("cut"), floats(0, 1)),
    tuples(just("insert"), floats(0, 1), sampled_from(["\0", "\xff", "\t", "\r", "é", "[" * 2000, "a" * 500])),
)
PLACES = sampled_from([("delete",), ("make_folder",), ("make_pipe",), ("make_link", "nowhere"), ("make_link", "/dev/full")])
NEUTRAL_YAML = sampled_from([["use_crlf"], ["add_mark"], ["reorder_yaml"], ["comment_yaml"], ["flow_yaml"], ["through_link"]])
YAML_VALUES = one_of(sampled_from([text for text in values.TEXTS if "\n" not in text]), sampled_from(values.YAML_VALUES))


def _at(file: str, change: Any) -> list[Any]:
    """The change of a file."""
    name, *rest = change
    return [name, file, *rest]


@composite
def _yaml_edits(draw: Draw, file: str) -> list[list[Any]]:
    pick = draw(integers(0, 9))
    if pick < 6:
        edits = []
        for _ in range(draw(integers(1, 2))):
            name, key = draw(sampled_from(["set_yaml", "set_yaml", "set_yaml", "repeat_yaml"])), draw(sampled_from(values.KEYS))
            value = draw(YAML_VALUES)
            edits.append([name, file, key, _few(value) if key in ("workers", "devices", "threads", "epochs") else value])
        return edits
    if pick == 6:
        return [["drop_yaml", file, draw(sampled_from(values.KEYS))]]
    if pick == 7:
        changes = draw(lists(NEUTRAL_YAML, min_size=1, max_size=2, unique_by=lambda change: change[0]))
        return [_at(file, change) for change in changes]
    if pick == 8:
        return [["write", file, draw(sampled_from(values.YAML_FILES))]]
    return [_at(file, draw(one_of(BYTES, tuples(just("recode"), sampled_from(["utf-16", "latin-1", "cp1252"])))))]


@composite
def recipes(draw: Draw) -> Input:
    """Changes of a recipe."""
    edits = draw(_yaml_edits("recipe.yaml"))
    words = ["train", "--config", "@recipe@"]
    if not any("epochs" in change for change in edits):
        words += ["--epochs", "1"]  # as the recipe does, unless its end is lost
    return Input("recipe", words, edits)


READERS = [
    ["evaluate", "@run@", "--json"],
    ["predict", "@run@", "@image@", "--json"],
    ["train", "--resume", "@run@"],
    ["train", "--resume", "@run@"],
    ["analyze", "--curves", "@run@", "--output", "@box@/made", "--json"],
    ["evaluate", "@safetensors@", "--json"],
]


@composite
def run_folders(draw: Draw) -> Input:
    """Changes of the files of a run, and what reads a run."""
    words = draw(sampled_from(READERS))
    run = "half" if words[0] == "train" and draw(booleans()) else "finished"
    pick = draw(integers(0, 9))
    if pick < 3:
        edits = draw(_yaml_edits("run/config.yaml"))
    elif pick < 6:
        row, column = draw(integers(0, 2)), draw(sampled_from(values.COLUMNS))
        cell = ("set_cell", row, column, draw(sampled_from(values.CELLS)))
        whole = [("drop_column", column), ("drop_row", row), ("use_crlf",), ("write", "a,b\n1,2\n"), ("write", "")]
        edits = [_at("run/metrics.csv", draw(one_of(sampled_from([cell, *whole]), BYTES)))]
    elif pick < 8:
        file = draw(sampled_from(values.RUN_FILES))
        edits = [_at(f"run/{file}", draw(one_of(PLACES, just(("through_link",)))))]
    else:
        file = draw(sampled_from(values.FURTHER_FILES))
        edits = [["add_file", f"run/{file}", draw(sampled_from(["", "a\tb\n", "a\n", "\udcff\n"]))]]
    return Input("run", words, edits, run)


@composite
def checkpoints(draw: Draw) -> Input:
    """Changes of checkpoints, and what reads them."""
    if draw(integers(0, 2)) == 0:
        words = draw(sampled_from([["evaluate", "@safetensors@", "--json"], ["predict", "@safetensors@", "@image@", "--json"]]))
        changes = one_of(
            tuples(just("set_description"), sampled_from(values.DESCRIBED), sampled_from(values.JSONS)),
            tuples(just("set_header"), sampled_from(values.IN_HEADER), sampled_from([*values.JSONS, '"F64"', '"BF16"'])),
            tuples(just("claim_header"), sampled_from([0, 1, 2**20, 2**40, -1])),
            BYTES,
        )
        return Input("checkpoint", words, [_at("run/model.safetensors", draw(changes))])
    readers = [
        ["evaluate", "@last@", "--json"],
        ["predict", "@run@", "@image@", "--json"],
        ["train", "--resume", "@run@"],
        [*TRAIN, "--data", "@data@", "--weights", "@last@"],
    ]
    file = "run/checkpoints/last.ckpt"
    item = tuples(just("set_item"), sampled_from(values.IN_CHECKPOINT), sampled_from(values.LITERALS))
    drop = tuples(just("drop_item"), sampled_from(values.IN_CHECKPOINT))
    edits = [_at(file, draw(one_of(item, item, drop, sampled_from([("save_again",), ("save_old",)]), BYTES)))]
    if draw(integers(0, 7)) == 0:
        edits = [["keep_weights", file], _at(file, draw(BYTES))]
    return Input("checkpoint", draw(sampled_from(readers)), edits, draw(sampled_from(["finished", "half"])))


@composite
def tars(draw: Draw) -> Input:
    """Changes of shards, and what reads them."""
    readers = [
        ["evaluate", "@run@", "--data", "@tar@", "--json"],
        ["evaluate", "@run@", "--data", "@tar@", "--json"],
        [*TRAIN, "--data", "@tar@", "--val-data", "@tar@"],
        [*TRAIN, "--data", "pipe:cat @tar@", "--epoch-images", "8", "--val-data", "@tar@"],
    ]
    number = draw(integers(0, 17))

    def member(field: str, texts: list[str], number: int = number) -> SearchStrategy[Any]:
        return tuples(just("set_member"), just(number), just(field), sampled_from(texts))

    changes = one_of(
        member("name", values.MEMBERS),
        member("content", values.LABELS, number | 1),
        member("content", values.CONTENTS),
        member("type", values.TYPES),
        member("pax", values.PAX),
        member("mtime", ["-1", "2**40", "0.5"]),
        tuples(just("claim_size"), just(number), sampled_from(values.SIZES)),
        sampled_from([("double_member", number), ("drop_member", number)]),
        tuples(just("sparse_member"), just(number & ~1), sampled_from([8, 2**33, 2**60])),
        sampled_from(
            [("labels_last",), ("below_folder", "a.b"), ("below_folder", "./x"), ("use_format", 0), ("use_format", 1)]
        ),
        BYTES,
    )
    edits = [_at("shards/val.tar", draw(changes))]
    if draw(integers(0, 5)) == 0:
        texts = tuples(just("write"), sampled_from(values.CLASS_FILES))
        edits = [_at("shards/classes.txt", draw(one_of(texts, PLACES)))]
    return Input("tar", draw(sampled_from(readers)), edits)


@composite
def coco_files(draw: Draw) -> Input:
    """Changes of annotations and results in COCO's format, and what reads them."""
    readers = [
        ["detect", "evaluate", "@res@", "--data", "@ann@", "--json"],
        ["detect", "evaluate", "@res@", "--data", "@ann@"],
        ["detect", "train", *STARTS["detect train"], "--output", "@box@/made"],
    ]
    words = draw(sampled_from(readers))
    is_results = words[1] == "evaluate" and draw(booleans())
    place = just(draw(sampled_from(values.IN_RESULTS if is_results else values.IN_ANNOTATIONS)))
    change = one_of(
        tuples(just("set_json"), place, sampled_from(values.JSONS)),
        tuples(just("set_json"), place, sampled_from([*values.JSONS, *values.ENTRIES])),
        tuples(just("repeat_json"), place, sampled_from(values.JSONS)),
        tuples(sampled_from(["drop_json", "double_json"]), place),
        sampled_from([("use_crlf",), ("add_mark",), ("indent_json",), ("add_to_json", "x"), ("through_link",)]),
        tuples(just("write"), sampled_from(["", "[]", "{}", "null"])),
        PLACES,
        BYTES,
    )
    return Input("coco", words, [_at("coco/res.json" if is_results else "coco/ann.json", draw(change))])


@composite
def folders(draw: Draw) -> Input:
    """Changes of a folder of images, and what reads it."""
    readers = [
        ["evaluate", "@run@", "--data", "@own@", "--json"],
        [*TRAIN, "--data", "@own@"],
        [*TRAIN, "--data", "@own@", "--on-bad-image", "skip"],
        ["predict", "@run@", "@own@/val/ant/0.png", "--json"],
        ["predict", "@run@", "@own@/val/ant", "--json"],
    ]
    change = one_of(
        tuples(sampled_from(["rename", "copy_to"]), sampled_from(values.NAMES)),
        tuples(just("write"), sampled_from(values.CONTENTS)),
        sampled_from(values.PIXELS).map(lambda size: ("claim_pixels", *size)),
        sampled_from([("make_link", "."), ("make_link", ".."), ("make_link", "/dev/zero"), ("through_link",)]),
        PLACES,
        BYTES,
    )
    return Input("folder", draw(sampled_from(readers)), [_at(draw(sampled_from(values.IMAGES)), draw(change))])


KINDS = {
    "command": command_lines(),
    "recipe": recipes(),
    "run": run_folders(),
    "checkpoint": checkpoints(),
    "tar": tars(),
    "coco": coco_files(),
    "folder": folders(),
}
