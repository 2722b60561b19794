"""What the options of timm's `train.py` are called here: for those who type them, or use an `args.yaml` of timm as a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from dgnet.errors import did_you_mean

TIMM_NAMES: dict[str, str] = {
    "aa": "--auto-augment",
    "amp": "--precision bf16 or fp16",
    "amp-dtype": "--precision",
    "b": "--batch-size",
    "clip-gradient": "--clip-grad",
    "data-dir": "--data",
    "dataset": "--data",
    "device": "--accelerator",
    "dist-bn": "--sync-bn",
    "distill-loss-weight": "--teacher-weight",
    "drop-connect": "--drop-path",
    "drop-path-rate": "--drop-path",
    "drop-rate": "--drop",
    "experiment": "--output",
    "gp": "--model-kwargs.global_pool",
    "grad-accum-steps": "--accumulate",
    "img-size": "--image-size",
    "initial-checkpoint": "--weights",
    "input-size": "--image-size",
    "j": "--workers",
    "kd-model-name": "--teacher",
    "kd-temperature": "--teacher-temperature",
    "log-interval": "",
    "lr-base": "--lr, with --lr-batch-size",
    "lr-base-size": "--lr-batch-size",
    "model-ema": "--ema",
    "model-ema-decay": "--ema",
    "no-aug": "--augment none",
    "num-classes": "",
    "opt": "--optimizer",
    "pin-mem": "",
    "re-count": "--recount",
    "re-mode": "--remode",
    "re-prob": "--reprob",
    "scheduler": "--sched",
    "sched-on-updates": "",
    "smoothing": "--label-smoothing",
    "torchcompile": "--compile",
    "train-crop-mode": "--augment",
    "train-split": "--data",
    "val-split": "--val-data",
    "wd": "--weight-decay",
    "warmup-prefix": "",
}
"""timm's name -> the option here. Empty: it is not needed, because the data or dgnet decide it."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """A hint like "; here it is --optimizer" for an unknown option `name`; else that of `did_you_mean`, among `allowed`."""
    key = name.lstrip("-").replace("_", "-")
    if key not in TIMM_NAMES:
        return did_you_mean(name, allowed)
    here = TIMM_NAMES[key]
    return f"; here it is {here}" if here else "; it is not needed here: leave it out"
