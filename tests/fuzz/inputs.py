"""Strategies for inputs of each kind. A new command or option is covered: they are taken from the parsers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import hypothesis.strategies as st

from dgnet.cli import COMMANDS
from dgnet.cli.command import Command, Group
from dgnet.compat.argparse import option_strings
from tests.fuzz.bases import QUICK
from tests.fuzz.judge import Input

TEXTS = [
    *("", " ", "0", "-1", "1", "2", "1.0", "0.5", "-0.5", "1e3", "5e-4", "1e400", "nan", "inf", "-inf", ".nan", "-.inf"),
    *("0x10", "010", "1_0", "1,5", "1e-400", "9" * 25, "-" + "9" * 400, "9223372036854775808", "true", "True", "no", "null"),
    *("None", "~", "[]", "[1", "[null]", "[1, 2]", "[nan]", "[[1]]", "{}", "{a: 1}", "{1: 2}", "{a: {b: [c]}}", "a: b", "- a"),
    *(
        "[" * 3000,
        "{a: " * 500,
        "&a [*a]",
        "&a [x, x]",
        "*a",
        "!!python/object:os.system {}",
        "!!binary aGk=",
        "!x y",
        "'",
        '"',
    ),
    *("é", "e\u0301", "💥", "\u202e", "\ud800", "a\x00b", "a\nb", "a\tb", "\x1b[31m", "a" * 300, "a" * 70000, "%s %d", "{0}"),
    *("auto", "cpu", "cuda", "mps", "meta", "all", "none", "2001-01-01", "1:30", "1 step", "0 steps", "1e9 minutes"),
]
PATHS = [
    *("@run@", "@data@", "@image@", "@safetensors@", "@last@", "@ann@", "@res@", "@tar@", "@recipe@", "@images@", "@box@"),
    *(
        "@run@/config.yaml",
        "@run@/nothing",
        "@image@/x",
        "@data@/train",
        "~",
        "~/x",
        "~nobody/x",
        ".",
        "..",
        "",
        "-",
        "a" * 300,
    ),
    *(
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "/nowhere/x",
        "x\x00y",
        "\udcff.png",
        "é.yaml",
        "a/" * 2100,
        "@run@/",
        "@run@//..",
    ),
    *(
        "{0..2}.tar",
        "{0..99999999999}.tar",
        "{a..",
        "{}.tar",
        "x.tar.gz",
        "pipe:false",
        "pipe:",
        "http://127.0.0.1:9/x.tar",
        "://",
    ),
    *("torch/cifar10", "torch/x", "torch/", "hfds/", "tfds/mnist", "wds/@tar@", "digits", "DIGITS", "digits/"),
]
WORDS = st.one_of(
    st.sampled_from(TEXTS), st.sampled_from(PATHS), st.text(max_size=8), st.integers().map(str), st.floats().map(str)
)

SMALL = {"--workers", "--devices", "--nodes", "--threads"}
"""Options that start as many processes as they say: large numbers of them are left out."""
SLOW = {"--compile", "--speed"}
"""Options that take minutes."""

STARTS = {
    "train": ["--data", "@data@", *QUICK, "--epochs", "1", "--output", "@box@/made"],
    "evaluate": ["@run@"],
    "predict": ["@run@", "@image@"],
    "analyze": ["--curves", "@run@", "--output", "@box@/made"],
    "export": ["@run@/nothing"],  # an export that succeeds takes half a minute
    "explore": ["@run@/nothing"],  # a page that is served never ends
    "bench": ["dg_none"],
    "cost": ["dg_resnet20"],
    "detect train": ["--data", "@ann@", "--images", "@images@", "--val-data", "@ann@", "--model", "dg_resnet20"],
    "detect evaluate": ["@res@", "--data", "@ann@"],
    "detect predict": ["@run@", "@image@"],
}
"""Words with which a command runs, quickly. A command that is not listed begins with no words."""


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


@st.composite
def command_lines(draw: Callable[[Any], Any]) -> Input:
    """Options of every command with all kinds of values, forms and repetitions."""
    name = draw(st.sampled_from(sorted(commands())))
    words = [*name.split(), *STARTS.get(name, [])]
    for _ in range(draw(st.integers(1, 3))):
        option = draw(st.sampled_from(commands()[name]))
        if option in ("-h", "--help") and draw(st.integers(0, 4)):
            continue
        value = draw(WORDS)
        if option in SMALL and len(value.strip()) > 1 and value.strip().lstrip("+-").isdigit() and len(value) < 12:
            value = "3"
        form = draw(
            st.sampled_from(["apart", "apart", "apart", "joined", "joined", "alone", "short", "dotted", "twice", "front"])
        )
        given = {
            "apart": [option, value],
            "joined": [f"{option}={value}"],
            "alone": [option],
            "short": [option[: max(4, len(option) // 2)], value],
            "dotted": [f"{option}.{draw(st.sampled_from(['x', 'layers', '1', '', 'a.b', 'é']))}", value],
            "twice": [option, value, option, draw(WORDS)],
        }
        if form == "front":
            words = [words[0], option, value, *words[1:]]
        else:
            words += given[form]
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(WORDS))
    return Input("command", words)


KEYS = (
    *(
        "data",
        "val_data",
        "data_root",
        "model",
        "model_kwargs",
        "weights",
        "output",
        "batch_size",
        "seed",
        "hflip",
        "optimizer",
    ),
    *(
        "accumulate",
        "lr",
        "lr_batch_size",
        "threshold_lr",
        "momentum",
        "weight_decay",
        "norm_decay",
        "routing_decay",
        "clip_grad",
    ),
    *("ema", "precision", "accelerator", "devices", "sync_bn", "checkpoint_every", "loggers", "workers", "threads", "holdout"),
    *("epoch_images", "epochs", "evaluate_every", "image_size", "crop_pct", "augment", "warmup_epochs", "label_smoothing"),
    *("budget", "budget_per", "budget_strength", "budget_warmup", "channels_last", "grad_checkpointing"),
    *("on_bad_image", "max_bad_images", "cache", "weighting", "topology", "shortcut", "unknown_key", "é", "1", "<<"),
)
VALUES = st.one_of(
    st.sampled_from([text for text in TEXTS if "\n" not in text]),
    st.sampled_from(["[a, b]", '"text"', "'1'", "0o17", "1e5", "[1, [2, [3]]]", "{a: null}", "1.0", "8.0", "8", "99", "0.1"]),
)
NEUTRAL_YAML = [["use_crlf"], ["add_mark"], ["reorder_yaml"], ["comment_yaml"], ["flow_yaml"], ["through_link"]]
BYTES = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.sampled_from(["\0", "\xff", "\t", "\r", "é", "[" * 2000, "a" * 500])),
)
PLACES = st.sampled_from([("delete",), ("make_folder",), ("make_pipe",), ("make_link", "nowhere"), ("make_link", "/dev/full")])


def _at(file: str, change: Any) -> list[Any]:
    """The change of a file."""
    name, *values = change
    return [name, file, *values]


@st.composite
def _yaml_edits(draw: Callable[[Any], Any], file: str) -> list[list[Any]]:
    pick = draw(st.integers(0, 9))
    if pick < 6:
        names = ["set_yaml", "set_yaml", "set_yaml", "repeat_yaml"]
        return [
            [draw(st.sampled_from(names)), file, draw(st.sampled_from(KEYS)), _few(draw(VALUES))]
            for _ in range(draw(st.integers(1, 2)))
        ]
    if pick == 6:
        return [["drop_yaml", file, draw(st.sampled_from(KEYS))]]
    if pick == 7:
        return [
            _at(file, change)
            for change in draw(st.lists(st.sampled_from(NEUTRAL_YAML), min_size=1, max_size=2, unique_by=lambda x: x[0]))
        ]
    if pick == 8:
        whole = [
            "",
            "[]",
            "a",
            "- a\n- b\n",
            "\t",
            "{",
            "[" * 5000,
            "---\na: 1\n---\nb: 2\n",
            "&a {b: *a}",
            "%YAML 1.2",
            "null",
            "1",
        ]
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 10)
        )
        return [["write", file, draw(st.sampled_from([*whole, bomb]))]]
    return [_at(file, draw(st.one_of(BYTES, st.tuples(st.just("recode"), st.sampled_from(["utf-16", "latin-1", "cp1252"])))))]


def _few(value: str) -> str:
    return value if len(value) < 3 or not value.isdigit() or len(value) > 12 else "3"


@st.composite
def recipes(draw: Callable[[Any], Any]) -> Input:
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
COLUMNS = ["epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "val_top5"]


@st.composite
def run_folders(draw: Callable[[Any], Any]) -> Input:
    """Changes of the files of a run, and what reads a run."""
    words = draw(st.sampled_from(READERS))
    run = "half" if words[0] == "train" and draw(st.booleans()) else "finished"
    pick = draw(st.integers(0, 9))
    file = draw(
        st.sampled_from(["config.yaml", "metrics.csv", "checkpoints/last.ckpt", "model.safetensors", "checkpoints/best.ckpt"])
    )
    if pick < 3:
        edits = draw(_yaml_edits("run/config.yaml"))
    elif pick < 6:
        text = draw(st.sampled_from(["", "nan", "inf", "-1", "1e400", "x", "99", "0.5", "9" * 300, '"', "é", "a\nb", "\0"]))
        row, column = draw(st.integers(0, 2)), draw(st.sampled_from(COLUMNS))
        change = st.sampled_from(
            [
                ["set_cell", row, column, text],
                ["drop_column", column],
                ["drop_row", row],
                ["use_crlf"],
                ["write", "a,b\n1,2\n"],
                ["write", ""],
            ]
        )
        edits = [_at("run/metrics.csv", draw(st.one_of(change, BYTES)))]
    elif pick < 8:
        edits = [_at(f"run/{file}", draw(st.one_of(PLACES, st.just(("through_link",)))))]
    else:
        names = ["bad_images.txt", ".x.part/x", "checkpoints/.last.ckpt.part", "notes.txt", ".DS_Store", "run.lock", ".lock"]
        edits = [["add_file", f"run/{draw(st.sampled_from(names))}", draw(st.sampled_from(["", "a\tb\n", "a\n", "\udcff\n"]))]]
    return Input("run", words, edits, run)


LITERALS = [
    *(
        "null",
        "0",
        "-1",
        "1",
        "10**9",
        "10**30",
        "nan",
        "inf",
        "0.5",
        "true",
        "''",
        "'x'",
        "[]",
        "[1]",
        "[1, 2, 3]",
        "[8, 8, 8]",
    ),
    *(
        "{}",
        "{'a': 1}",
        "{1: 2}",
        "{'num_classes': 5}",
        "{'pretrained': True}",
        "{'drop_rate': 'x'}",
        "[null]",
        "['a']",
        "['a'] * 3",
    ),
    *(
        "[0, 0]",
        "[10**9, 10**9]",
        "[-8, 8]",
        "[nan] * 3",
        "[0.0] * 3",
        "[0.5] * 3",
        "[inf, 1, 1]",
        "torch.zeros(2)",
        "b'x'",
        "(1, 2)",
    ),
    *(
        "'resnet18'",
        "'dg_resnet18'",
        "'bilinear'",
        "'x' * 5000",
        "'\\ud800'",
        "'a\\0b'",
        "['ant', 'ant', 'cat']",
        "['ant'] * 4",
    ),
    *(
        "torch.full((4,), nan)",
        "torch.zeros(3, 4, dtype=torch.int8)",
        "torch.zeros(0)",
        "torch.zeros(2, dtype=torch.complex64)",
    ),
]
DESCRIBED = [
    [],
    *([name] for name in ("model", "model_kwargs", "class_names", "preprocessing", "config", "task", "é")),
    *(["preprocessing", name] for name in ("image_size", "mean", "std", "crop_pct", "interpolation", "x")),
    *(["model_kwargs", name] for name in ("channels", "num_classes", "threshold_offset", "inference_weight", "x", "drop_rate")),
    *(["config", name] for name in ("data", "val_data", "data_root", "holdout", "image_size", "lr", "x")),
    ["class_names", 0],
]
IN_CKPT = [
    *(["dgnet", *keys] for keys in DESCRIBED),
    *(
        [name]
        for name in ("state_dict", "epoch", "global_step", "loops", "optimizer_states", "lr_schedulers", "callbacks", "x")
    ),
    *(["state_dict", name] for name in ("network.fc.weight", "network.conv1.weight", "network.x", "x")),
    *(
        ["optimizer_states", 0],
        ["optimizer_states", 0, "param_groups"],
        ["optimizer_states", 0, "state"],
        ["loops", "fit_loop"],
    ),
    *(["optimizer_states", 0, "state", 0], ["lr_schedulers", 0], ["pytorch-lightning_version"], ["hyper_parameters"]),
    ["loops", "fit_loop", "epoch_progress", "current", "completed"],
]
JSONS = [
    *(
        "null",
        "0",
        "-1",
        "1",
        "1e400",
        "NaN",
        "Infinity",
        "0.5",
        "true",
        '""',
        '"x"',
        "[]",
        "[1]",
        "[1, 2, 3]",
        "{}",
        '{"a": 1}',
    ),
    *(
        "9" * 30,
        "9" * 5000,
        "[" * 100000,
        "{",
        '"\\ud800"',
        '"a\\u0000b"',
        "[null]",
        "[0, 0]",
        "[NaN, 1, 1]",
        "[8, 8]",
        "[0.5, 0.5, 0.5]",
    ),
    *(
        "[1, 1, -5, 5]",
        "[1e30, 0, 5, 5]",
        "[1, 1, 5]",
        '["1", "1", "5", "5"]',
        "[1, 1, 0, 5]",
        '"1"',
        "1.5",
        "1.0",
        "-0.0",
        "1e-320",
        "2",
    ),
]


@st.composite
def checkpoints(draw: Callable[[Any], Any]) -> Input:
    """Changes of checkpoints, and what reads them."""
    run = draw(st.sampled_from(["finished", "half"]))
    last = [
        ["evaluate", "@last@", "--json"],
        ["predict", "@run@", "@image@", "--json"],
        ["train", "--resume", "@run@"],
        ["train", "--data", "@data@", *QUICK, "--epochs", "1", "--weights", "@last@", "--output", "@box@/made"],
    ]
    whole = [["evaluate", "@safetensors@", "--json"], ["predict", "@safetensors@", "@image@", "--json"]]
    if draw(st.integers(0, 2)):
        words, file = draw(st.sampled_from(last)), "run/checkpoints/last.ckpt"
        changes = st.one_of(
            st.tuples(st.just("set_item"), st.sampled_from(IN_CKPT), st.sampled_from(LITERALS)),
            st.tuples(st.just("set_item"), st.sampled_from(IN_CKPT), st.sampled_from(LITERALS)),
            st.tuples(st.just("drop_item"), st.sampled_from(IN_CKPT)),
            st.sampled_from([("save_again",), ("save_old",)]),
            BYTES,
        )
        edits = [_at(file, draw(changes))]
        if draw(st.integers(0, 7)) == 0:
            edits.insert(0, ["keep_weights", file])
            edits[1:] = [_at(file, draw(BYTES))]
    else:
        run = "finished"
        words, file = draw(st.sampled_from(whole)), "run/model.safetensors"
        header = [
            ["fc.weight"],
            ["fc.weight", "dtype"],
            ["fc.weight", "shape"],
            ["fc.weight", "data_offsets"],
            ["__metadata__"],
            ["x"],
        ]
        changes = st.one_of(
            st.tuples(st.just("set_description"), st.sampled_from(DESCRIBED[1:]), st.sampled_from(JSONS)),
            st.tuples(
                st.just("set_header"),
                st.sampled_from([*header, ["__metadata__", "dgnet"]]),
                st.sampled_from([*JSONS, '"F64"', '"BF16"']),
            ),
            st.tuples(st.just("claim_header"), st.sampled_from([0, 1, 2**20, 2**40, -1])),
            BYTES,
        )
        edits = [_at(file, draw(changes))]
    return Input("checkpoint", words, edits, run)


@st.composite
def tars(draw: Callable[[Any], Any]) -> Input:
    """Changes of shards, and what reads them."""
    words = draw(
        st.sampled_from(
            [
                ["evaluate", "@run@", "--data", "@tar@", "--json"],
                ["evaluate", "@run@", "--data", "@tar@", "--json"],
                ["train", "--data", "@tar@", "--val-data", "@tar@", *QUICK, "--epochs", "1", "--output", "@box@/made"],
                [
                    "train",
                    "--data",
                    "pipe:cat @tar@",
                    "--epoch-images",
                    "8",
                    "--val-data",
                    "@tar@",
                    *QUICK,
                    "--epochs",
                    "1",
                    "--output",
                    "@box@/made",
                ],
            ]
        )
    )
    number = draw(st.integers(0, 17))
    names = [
        "",
        "/",
        "..",
        "../../x.png",
        "a.b.png",
        "a/b.c/0.png",
        "a" * 300 + ".png",
        "é.png",
        "\udcff.png",
        "x.PNG",
        "x.cls",
        ".png",
        "._0.png",
        "a\nb.png",
        "__x.png",
    ]
    labels = [
        "",
        "x",
        "-1",
        "3",
        "99999",
        "1" + "0" * 100,
        "1_0",
        " 1\r\n",
        "1.0",
        "0x1",
        "１",
        "\ufeff1",
        "1\n2",
        "true",
        "é",
        "\0",
    ]
    paxes = [
        '{"size": "-5"}',
        '{"size": "99999999999"}',
        '{"path": ""}',
        '{"size": "x"}',
        '{"mtime": "nan"}',
        '{"comment": "x"}',
        '{"hdrcharset": "x"}',
    ]
    member = st.one_of(
        st.tuples(st.just("set_member"), st.just(number), st.just("name"), st.sampled_from(names)),
        st.tuples(st.just("set_member"), st.just(number | 1), st.just("content"), st.sampled_from(labels)),
        st.tuples(
            st.just("set_member"), st.just(number), st.just("content"), st.sampled_from(["", "x", "GIF89a", "\x89PNG\r\n"])
        ),
        st.tuples(
            st.just("set_member"),
            st.just(number),
            st.just("type"),
            st.sampled_from(["1", "2", "3", "5", "6", "7", "x", "g", "L", "S", "Z"]),
        ),
        st.tuples(st.just("set_member"), st.just(number), st.just("pax"), st.sampled_from(paxes)),
        st.tuples(st.just("set_member"), st.just(number), st.just("mtime"), st.sampled_from(["-1", "2**40", "0.5"])),
        st.tuples(
            st.just("claim_size"),
            st.just(number),
            st.sampled_from(["77777777777", "-1", "x", "\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", "", " 0"]),
        ),
        st.tuples(st.just("double_member"), st.just(number)),
        st.tuples(st.just("drop_member"), st.just(number)),
        st.tuples(st.just("sparse_member"), st.just(number & ~1), st.sampled_from([8, 2**33, 2**60])),
    )
    neutral = st.sampled_from(
        [
            ("labels_last",),
            ("below_folder", "a.b"),
            ("below_folder", "./x"),
            ("use_format", 0),
            ("use_format", 1),
            ("through_link",),
        ]
    )
    edits = [_at("shards/val.tar", draw(st.one_of(member, member, member, neutral, BYTES)))]
    if draw(st.integers(0, 5)) == 0:
        classes = [
            "",
            "ant\n",
            "ant\nbee\ncat\ncat\n",
            "ant\nant\ncat\n",
            "bee\nant\ncat\n",
            "\ufeffant\nbee\ncat\n",
            "ant\r\nbee\r\ncat\r\n",
            "\n\n",
            "x\n" * 4000,
        ]
        edits = [
            draw(
                st.sampled_from(
                    [
                        ["write", "shards/classes.txt", draw(st.sampled_from(classes))],
                        ["delete", "shards/classes.txt"],
                        ["make_folder", "shards/classes.txt"],
                    ]
                )
            )
        ]
    return Input("tar", words, edits)


@st.composite
def coco_files(draw: Callable[[Any], Any]) -> Input:
    """Changes of annotations and results in COCO's format, and what reads them."""
    words = draw(
        st.sampled_from(
            [
                ["detect", "evaluate", "@res@", "--data", "@ann@", "--json"],
                ["detect", "evaluate", "@res@", "--data", "@ann@"],
                ["detect", "train", *STARTS["detect train"], "--output", "@box@/made"],
            ]
        )
    )
    if words[1] == "evaluate" and draw(st.booleans()):
        file, keys = (
            "coco/res.json",
            [[3], *([3, name] for name in ("image_id", "category_id", "bbox", "score", "segmentation")), [3, "bbox", 2]],
        )
    else:
        file = "coco/ann.json"
        keys = [
            *(["images"], ["annotations"], ["categories"], ["info"], ["images", 1], ["annotations", 2], ["categories", 0]),
            *(["images", 1, name] for name in ("id", "file_name", "width", "height")),
            *(
                ["annotations", 2, name]
                for name in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
            ),
            *(["categories", 0, name] for name in ("id", "name", "supercategory")),
            ["annotations", 2, "bbox", 0],
        ]
    place = draw(st.sampled_from(keys))
    change = st.one_of(
        st.tuples(st.just("set_json"), st.just(place), st.sampled_from(JSONS)),
        st.tuples(st.just("set_json"), st.just(place), st.sampled_from(JSONS)),
        st.tuples(
            st.just("set_json"),
            st.just(place),
            st.sampled_from(['"../1.png"', '"/etc/passwd"', '"a\\tb"', '"1.png"', "3", "7", "true"]),
        ),
        st.tuples(st.just("repeat_json"), st.just(place), st.sampled_from(JSONS)),
        st.tuples(st.just("drop_json"), st.just(place)),
        st.tuples(st.just("double_json"), st.just(place)),
        BYTES,
        st.sampled_from([("use_crlf",), ("add_mark",), ("indent_json",), ("add_to_json", "x"), ("through_link",)]),
        st.sampled_from(
            [("write", ""), ("write", "[]"), ("write", "{}"), ("write", "null"), ("make_folder",), ("make_pipe",), ("delete",)]
        ),
    )
    return Input("coco", words, [_at(file, draw(change))])


KINDS = {
    "command": command_lines(),
    "recipe": recipes(),
    "run": run_folders(),
    "checkpoint": checkpoints(),
    "tar": tars(),
    "coco": coco_files(),
}
