"""Values that inputs are made of: texts, keys, and places in files."""

# fmt: off
from __future__ import annotations

from typing import Any

TEXTS = [
    "", " ", "0", "-1", "1", "2", "1.0", "0.5", "-0.5", "1e3", "5e-4", "1e400", "nan", "inf", "-inf", ".nan", "-.inf", "0x10",
    "010", "1_0", "1,5", "1e-400", "9" * 25, "-" + "9" * 400, "9223372036854775808", "true", "True", "no", "null", "None", "~",
    "[]", "[1", "[null]", "[1, 2]", "[nan]", "[[1]]", "{}", "{a: 1}", "{1: 2}", "{a: {b: [c]}}", "a: b", "- a", "[" * 3000,
    "{a: " * 500, "&a [*a]", "&a [x, x]", "*a", "!!python/object:os.system {}", "!!binary aGk=", "!x y", "'", '"', "é",
    "e\u0301", "💥", "\u202e", "\ud800", "a\x00b", "a\nb", "a\tb", "\x1b[31m", "a" * 300, "a" * 70000, "%s %d", "{0}",
    "auto", "cpu", "cuda", "mps", "meta", "all", "none", "2001-01-01", "1:30", "1 step", "0 steps", "1e9 minutes",
]
PATHS = [
    "@run@", "@data@", "@image@", "@safetensors@", "@last@", "@ann@", "@res@", "@tar@", "@recipe@", "@images@", "@box@",
    "@run@/config.yaml", "@run@/nothing", "@image@/x", "@data@/train", "~", "~/x", "~nobody/x", ".", "..", "", "-", "a" * 300,
    "/dev/null", "/dev/full", "/proc/self/mem", "/nowhere/x", "x\x00y", "\udcff.png", "é.yaml", "a/" * 2100, "@run@/",
    "@run@//..", "{0..2}.tar", "{0..99999999999}.tar", "{a..", "{}.tar", "x.tar.gz", "pipe:false", "pipe:",
    "http://127.0.0.1:9/x.tar", "://", "torch/cifar10", "torch/x", "torch/", "hfds/", "tfds/mnist", "wds/@tar@",
    "digits", "DIGITS", "digits/",
]
MODEL_OPTIONS = ["channels", "layers", "threshold_offset", "drop_rate", "act_layer", "num_classes", "router_std", "gate", "x"]
MODEL_VALUES = [
    "-1", "0", "[0, 0, 0]", "[-4, 4, 4]", "[4, 4]", "[]", "[4.5, 4, 4]", "null", "nan", "relu", "1e400", "{}", "99999999999",
]
SPECIAL = {
    "--model-kwargs": [f"{{{name}: {value}}}" for name in MODEL_OPTIONS for value in MODEL_VALUES],
    "--loggers": [
        "[{class_path: os.system}]", "[{class_path: x}]", "[{class_path: x.y}]", "[{class_path: 5}]", "[{init_args: {}}]",
        "[{class_path: lightning.pytorch.loggers.CSVLogger}]", "[{class_path: lightning.Trainer}]",
        "[{class_path: builtins.print, init_args: {x: 1}}]",
        "[{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: /dev/null/x}}]",
    ],
    "--topology": ["er", "ba,ws", "er,er,er", "er,er,er,er", ",", "chain,", "ER"],
    "--checkpoint-every": ["1 step", "-1 steps", "1e9 minutes", "9" * 30 + " steps", "1", "steps", "0.0001 minutes"],
    "--offsets": ["[]", "[nan]", "[0, 0]", "[1e400]", "[[0]]", "0", "[-9]"],
    "--mode": ["dense", "sparse", "SPARSE"],
    "--precision": ["32", "bf16", "fp16", "64", "16-true"],
    "--optimizer": ["sgd", "adamw", "lbfgs", "lion", "adahessian", "sgd:momentum"],
    "--detector-kwargs": ["{min_size: 1}", "{x: 1}", "{box_score_thresh: nan}", "{rpn_pre_nms_top_n_train: -1}", "{1: 2}"],
}
"""Values that an option might take."""

KEYS = [
    "data", "val_data", "data_root", "model", "model_kwargs", "weights", "output", "batch_size", "seed", "hflip", "optimizer",
    "accumulate", "lr", "lr_batch_size", "threshold_lr", "momentum", "weight_decay", "norm_decay", "routing_decay", "clip_grad",
    "ema", "precision", "accelerator", "devices", "sync_bn", "checkpoint_every", "loggers", "workers", "threads", "holdout",
    "epoch_images", "epochs", "evaluate_every", "image_size", "crop_pct", "augment", "warmup_epochs", "label_smoothing",
    "budget", "budget_per", "budget_strength", "budget_rule", "budget_warmup", "channels_last", "grad_checkpointing",
    "on_bad_image", "max_bad_images", "cache", "weighting", "topology", "shortcut", "unknown_key", "é", "1", "<<",
]
YAML_VALUES = ["[a, b]", '"text"', "'1'", "0o17", "1e5", "[1, [2, [3]]]", "{a: null}", "1.0", "8.0", "8", "99", "0.1"]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 10))
YAML_FILES = [
    "", "[]", "a", "- a\n- b\n", "\t", "{", "[" * 5000, "---\na: 1\n---\nb: 2\n", "&a {b: *a}", "%YAML 1.2", "null", "1", BOMB,
]

RUN_FILES = ["config.yaml", "metrics.csv", "checkpoints/last.ckpt", "model.safetensors", "checkpoints/best.ckpt"]
COLUMNS = ["epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "val_top5"]
CELLS = ["", "nan", "inf", "-1", "1e400", "x", "99", "0.5", "9" * 300, '"', "é", "a\nb", "\0"]
FURTHER_FILES = ["bad_images.txt", ".x.part/x", "checkpoints/.last.ckpt.part", "notes.txt", ".DS_Store", "run.lock", ".lock"]

LITERALS = [  # of Python
    "null", "0", "-1", "1", "10**9", "10**30", "nan", "inf", "0.5", "true", "''", "'x'", "[]", "[1]", "[1, 2, 3]", "[8, 8, 8]",
    "{}", "{'a': 1}", "{1: 2}", "{'num_classes': 5}", "{'pretrained': True}", "{'drop_rate': 'x'}", "[null]", "['a']",
    "['a'] * 3", "[0, 0]", "[10**9, 10**9]", "[-8, 8]", "[nan] * 3", "[0.0] * 3", "[0.5] * 3", "[inf, 1, 1]", "torch.zeros(2)",
    "b'x'", "(1, 2)", "'resnet18'", "'dg_resnet18'", "'bilinear'", "'x' * 5000", "'\\ud800'", "'a\\0b'",
    "['ant', 'ant', 'cat']", "['ant'] * 4", "torch.full((4,), nan)", "torch.zeros(3, 4, dtype=torch.int8)", "torch.zeros(0)",
    "torch.zeros(2, dtype=torch.complex64)",
]
JSONS = [
    "null", "0", "-1", "1", "1e400", "NaN", "Infinity", "0.5", "true", '""', '"x"', "[]", "[1]", "[1, 2, 3]", "{}", '{"a": 1}',
    "9" * 30, "9" * 5000, "[" * 100000, "{", '"\\ud800"', '"a\\u0000b"', "[null]", "[0, 0]", "[NaN, 1, 1]", "[8, 8]",
    "[0.5, 0.5, 0.5]", "[1, 1, -5, 5]", "[1e30, 0, 5, 5]", "[1, 1, 5]", '["1", "1", "5", "5"]', "[1, 1, 0, 5]", '"1"', "1.5",
    "1.0", "-0.0", "1e-320", "2",
]
DESCRIBED: list[list[Any]] = [  # places in the description of a network
    ["model"], ["model_kwargs"], ["class_names"], ["preprocessing"], ["config"], ["task"], ["é"], ["class_names", 0],
    *(["preprocessing", name] for name in ("image_size", "mean", "std", "crop_pct", "interpolation", "x")),
    *(["model_kwargs", name] for name in ("channels", "num_classes", "threshold_offset", "inference_weight", "x", "drop_rate")),
    *(["config", name] for name in ("data", "val_data", "data_root", "holdout", "image_size", "lr", "x")),
]
IN_CHECKPOINT: list[list[Any]] = [
    ["dgnet"], *(["dgnet", *keys] for keys in DESCRIBED),
    ["state_dict"], ["epoch"], ["global_step"], ["loops"], ["optimizer_states"], ["lr_schedulers"], ["callbacks"], ["x"],
    *(["state_dict", name] for name in ("network.fc.weight", "network.conv1.weight", "network.x", "x")),
    ["optimizer_states", 0], ["optimizer_states", 0, "param_groups"], ["optimizer_states", 0, "state"],
    ["optimizer_states", 0, "state", 0], ["lr_schedulers", 0], ["pytorch-lightning_version"], ["hyper_parameters"],
    ["loops", "fit_loop"], ["loops", "fit_loop", "epoch_progress", "current", "completed"],
]
IN_HEADER: list[list[Any]] = [
    ["fc.weight"], ["fc.weight", "dtype"], ["fc.weight", "shape"], ["fc.weight", "data_offsets"], ["__metadata__"], ["x"],
    ["__metadata__", "dgnet"],
]

MEMBERS = [
    "", "/", "..", "../../x.png", "a.b.png", "a/b.c/0.png", "a" * 300 + ".png", "é.png", "\udcff.png", "x.PNG", "x.cls", ".png",
    "._0.png", "a\nb.png", "__x.png",
]
LABELS = ["x", "-1", "3", "99999", "1" + "0" * 100, "1_0", " 1\r\n", "1.0", "0x1", "１", "\ufeff1", "1\n2", "true", "é", "\0"]
PAX = [
    '{"size": "-5"}', '{"size": "99999999999"}', '{"path": ""}', '{"size": "x"}', '{"mtime": "nan"}', '{"comment": "x"}',
    '{"hdrcharset": "x"}',
]
SIZES = ["77777777777", "-1", "x", "\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", "", " 0"]
TYPES = ["1", "2", "3", "5", "6", "7", "x", "g", "L", "S", "Z"]
CLASS_FILES = [
    "", "ant\n", "ant\nbee\ncat\ncat\n", "ant\nant\ncat\n", "bee\nant\ncat\n", "\ufeffant\nbee\ncat\n", "ant\r\nbee\r\ncat\r\n",
    "\n\n", "x\n" * 4000,
]

IN_RESULTS: list[list[Any]] = [
    [3], [3, "image_id"], [3, "category_id"], [3, "bbox"], [3, "score"], [3, "segmentation"], [3, "bbox", 2],
]
IN_ANNOTATIONS: list[list[Any]] = [
    ["images"], ["annotations"], ["categories"], ["info"], ["images", 1], ["annotations", 2], ["categories", 0],
    *(["images", 1, name] for name in ("id", "file_name", "width", "height")),
    *(["annotations", 2, name] for name in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")),
    *(["categories", 0, name] for name in ("id", "name", "supercategory")), ["annotations", 2, "bbox", 0],
]
ENTRIES = ['"../1.png"', '"/etc/passwd"', '"a\\tb"', '"1.png"', "3", "7", "true"]

IMAGES = [
    "own/val/ant/0.png", "own/val/ant/0.png", "own/train/bee/1.png", "own/val/bee", "own/train/cat", "own/val", "own/train",
]
NAMES = [
    "a\tb.png", "a\nb.png", "\udcff.png", "é.png", "0.gif", "0.PNG", "0.png.part", ".0.png", "._0.png", "0", "x" * 250 + ".png",
    "\x1b[31m.png", "0.jpg", "ANT", ".x", "test", "val", "valid",
]
CONTENTS = [
    "", "x", "GIF89a", "RIFF", "%PDF", "<svg/>", "P5 9 9 255\n", "P6\n999999 999999\n255\n", "BM", "II*\0", "\x89PNG\r\n",
]
PIXELS = [(0, 0), (1, 1), (8, 10**6), (10**5, 10**5), (2**31 - 1, 1), (7, 9)]
