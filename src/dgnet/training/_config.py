"""Options of training, as frozen dataclasses. The commands' options, their help texts and the recipes follow from them.

torch and timm are imported only when a configuration is checked, so that `--help` prints at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dgnet.code import list_packages
from dgnet.devices import ACCELERATORS
from dgnet.errors import UsageError, check_choice, shorten
from dgnet.options import (
    LARGEST_SIDE,
    MOST_THREADS,
    MOST_WORKERS,
    check_bounds,
    check_choices,
    check_groups,
    flag,
    option,
    read_options,
)
from dgnet.presets import PRESETS, expand_preset
from dgnet.training._config_augmentation import AugmentationOptions
from dgnet.training._config_finetuning import FineTuningOptions
from dgnet.training._config_optimizer import LARGEST_RATE, OptimizerOptions
from dgnet.training._config_schedule import ScheduleOptions
from dgnet.training._config_search import SearchOptions
from dgnet.typed import Location

if TYPE_CHECKING:
    from torch import nn

_OWN_OPTIONS = ("weighting", "topology", "shortcut")

_LONGEST_INTERVAL = 1_000_000_000

# Options that a resumed run may change: where the data are, and which hardware is used. They do not change the result.
RESUME_OPTIONS = (
    *("data", "val_data", "data_root", "images", "val_images", "accelerator", "devices", "nodes", "workers", "threads"),
    *("checkpoint_every", "max_bad_images", "max_pixels", "imports"),
)

# Model options that --model-kwargs cannot set, and the reason or the option to use instead.
_TAKEN = {
    "num_classes": "it follows from the data",
    "in_chans": "dgnet train has --in-chans, and detectors read images as RGB",
    "pretrained": "start from a file with --weights",
    "checkpoint_path": "start from a file with --weights",
    "features_only": "the command decides it",
    "dynamic": "use --dynamic",
    "preset": "use --preset",
    **{name: f"use --{name}" for name in _OWN_OPTIONS},
}

_BOUNDS: dict[str, tuple[float, ...]] = {
    "batch_size": (1,),
    "threads": (1, MOST_THREADS),
    "workers": (0, MOST_WORKERS),
    "seed": (0, 2**32 - 1),
    "accumulate": (1,),
    "ema": (0, 1),
    "nodes": (1,),
    "hflip": (0, 1),
}


@dataclass(frozen=True)
class RunConfig(OptimizerOptions):
    """Options of every training run. Raises UsageError for a value that is not allowed."""

    model: str = option("dg_resnet20", "model name; for a list: dgnet models")
    weighting: str | None = option(
        None,
        "how edges are weighted: routed (the default), signed, linear, softmax, learned, fixed, or my_package.MyWeighting",
    )
    topology: str | None = option(
        None,
        "which edges exist: complete (the default), residual, chain, er, ba, ws; or one for each stage, separated by commas;"
        " or my_package.my_topology",
    )
    shortcut: str | None = option(None, "where the residual shortcut is: edge (the default), node")
    preset: str | None = option(
        None,
        "connectivity in the form of another network: " + ", ".join(PRESETS) + "; a static network is converted",
    )
    dynamic: bool = option(False, "convert a static network of timm: its runs of residual blocks become dynamic stages")
    model_kwargs: dict[str, Any] = option(
        {}, "further model options, as a dict; to add one to those of a recipe: --model-kwargs.router_bias 0"
    )
    imports: str | None = option(
        None, "packages of your own, separated by commas: import them before the network is built, and trust their code"
    )
    weights: Location | None = option(None, "start from the weights in this file or run folder")
    output: Location | None = option(None, "run folder, new or empty; by default the next free runs/MODEL-N")
    batch_size: int = option(32, "images in a training step, on all devices together")
    seed: int = option(0, "seed of initialisation, order and augmentation")
    hflip: float = option(0.5, "probability of a horizontal flip")
    accumulate: int = option(
        1, "batches of each device in a step; more of them need less memory, and --batch-size stays the same"
    )
    ema: float | None = option(None, "evaluate and save a moving average of the weights with this decay, for example 0.9999")
    precision: str = option("32", "number format: 32, bf16 or fp16; bf16 and fp16 use autocast", ("32", "bf16", "fp16"))
    accelerator: str = option("auto", "what to train on: auto, cpu, gpu (CUDA or Apple's), cuda, mps", ACCELERATORS)
    devices: str = option(
        "1", "number of devices of each machine to train on; auto: all of them; 0,2: these GPUs; ignored under torchrun"
    )
    nodes: int = option(1, "number of machines; ignored under torchrun")
    sync_bn: bool = option(False, "batch normalisation over the images of all devices (CUDA)")
    checkpoint_every: str = option(
        "15 minutes", "how often to write checkpoints/last.ckpt, besides each epoch's end: '500 steps' or '15 minutes'"
    )
    loggers: list[dict[str, Any]] = option(
        [], "further Lightning loggers: [{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: NAME}}]"
    )
    workers: int = option(0, "processes that load images; 0: the main process loads them")
    threads: int | None = option(None, "CPU threads of PyTorch; by default its own choice")
    max_pixels: float | None = option(None, "largest image, in million pixels; by default 178.9, Pillow's limit")

    command: ClassVar[str]
    """The command that trains with this configuration, as typed after `dgnet`."""

    def __post_init__(self) -> None:
        read_options(self)
        check_choices(self)
        check_groups(self)

    def check(self) -> None:
        """Raises UsageError for a value that is not allowed."""
        check_bounds(self, _BOUNDS)
        if self.ema == 1:
            raise UsageError("--ema must be below 1, got 1")
        if self.batch_size % self.accumulate:
            raise UsageError(f"--batch-size {self.batch_size} cannot be divided by --accumulate {self.accumulate}")
        self.checkpoint_interval()
        list_packages(self.imports, flag("imports"))
        for logger in self.loggers:
            arguments = logger.get("init_args", {})
            is_known = logger.keys() <= {"class_path", "init_args"} and isinstance(arguments, dict)
            if not isinstance(logger.get("class_path"), str) or not is_known:
                raise UsageError(f"--loggers takes {{class_path: …, init_args: {{…}}}}, got {logger}")
        if self.preset is not None:
            check_choice("--preset", self.preset, tuple(PRESETS))
        for name in _TAKEN.keys() & self.model_kwargs.keys():
            raise UsageError(f"--model-kwargs cannot set {name}: {_TAKEN[name]}")

    @property
    def peak_lr(self) -> float:
        """The rate after warm-up: `lr`, scaled by `batch_size` / `lr_batch_size` if that is given (Goyal et al., 2017)."""
        return self.lr * self.batch_size / self.lr_batch_size if self.lr_batch_size else self.lr

    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """Steps or seconds between checkpoints; the other is None. Raises UsageError for a text that is neither."""
        found = re.fullmatch(r"([\d.]+) *(steps?|min|minutes?)", self.checkpoint_every.strip())
        try:
            number = float(found[1]) if found else 0.0
        except ValueError:
            number = 0.0
        got = shorten(repr(self.checkpoint_every), 60)
        if number > _LONGEST_INTERVAL:
            raise UsageError(f"--checkpoint-every must be at most {_LONGEST_INTERVAL:,} steps or minutes, got {got}")
        if not found or number <= 0 or (found[2].startswith("s") and number % 1):
            raise UsageError(f"--checkpoint-every must be like '500 steps' or '15 minutes', got {got}")
        return (int(number), None) if found[2].startswith("s") else (None, 60 * number)

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `create_model`: weighting, topology, shortcut and preset, if given, and `model_kwargs`."""
        axes = {name: getattr(self, name) for name in _OWN_OPTIONS}
        dynamic = {"dynamic": True} if self.dynamic else {}
        given = {**dynamic, **{name: value for name, value in axes.items() if value is not None}, **self.model_kwargs}
        return expand_preset(self.model, self.preset, given)

    def schedule(self) -> tuple[int, int]:
        """The number of epochs, each a row of metrics.csv; and after how many of them there is an evaluation."""
        raise NotImplementedError

    def resolve(self, network: nn.Module) -> Self:
        """This configuration with all options of `network` filled in, so that it holds every value that decides the result."""
        return self.with_network(getattr(network, "connectivity_options", {}))

    def with_network(self, options: Mapping[str, Any]) -> Self:
        """This configuration with these options of the network."""
        axes = {name: value for name, value in options.items() if name in _OWN_OPTIONS}
        others = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
        return replace(self, model_kwargs={**self.model_kwargs, **others}, **axes)


_NETWORK_OPTIONS = {"drop": "drop_rate", "drop_path": "drop_path_rate"}
"""Options of training -> the options of the network that they set."""

_TRAIN_BOUNDS: dict[str, tuple[float, ...]] = {
    "epochs": (1,),
    "image_size": (1, LARGEST_SIDE),
    "in_chans": (1,),
    "holdout": (0,),
    "evaluate_every": (1,),
    "epoch_images": (1,),
    "crop_pct": (0.01, 1),
    "max_bad_images": (0,),
    "label_smoothing": (0, 1),
    "budget": (0, 1),
    "budget_strength": (0, LARGEST_RATE),
    "budget_warmup": (0, 1),
}


@dataclass(frozen=True)
class TrainConfig(SearchOptions, AugmentationOptions, FineTuningOptions, ScheduleOptions, RunConfig):
    """Options of a training run of a classifier. Raises UsageError for a value that is not allowed."""

    data: Location = option(
        "digits",
        "training data: digits (never flipped), a folder of class folders, shards (…{000..004}.tar, also URLs and pipe:),"
        " torch/…, hfds/…",
    )
    val_data: Location | None = option(
        None, "evaluation data; not needed if --data has its own (train/ and val/, digits, torch/…, hfds/…)"
    )
    epoch_images: int | None = option(None, "number of images in an epoch of a stream (--data URL or pipe:)")
    holdout: int = option(0, "evaluate on this many of the training images instead of --val-data, and train on the others")
    data_root: Location = option("data", "folder of the torch/… and hfds/… data sets")
    epochs: int = option(20, "passes over the training images")
    evaluate_every: int = option(1, "number of epochs between evaluations; must divide --epochs")
    image_size: int | None = option(None, "side of the square input in pixels; by default the model's own, 16 for digits")
    crop_pct: float | None = option(
        None, "share of the short side in the centre crop of evaluation (0.875: 224 of 256); by default the model's own"
    )
    in_chans: int | None = option(None, "input channels: 3 reads images as RGB (the default), 1 as grey")
    mean: list[float] | float | None = option(
        None, "mean of each channel, for images in [0, 1], or one value for all; by default the model's own"
    )
    std: list[float] | float | None = option(None, "standard deviation, like --mean")
    label_smoothing: float = option(0.0, "label smoothing of the training loss")
    start: str = option(
        "paper",
        "how a dg_ network starts from the weights of a static one: paper: as the paper's routers do, with another function;"
        " static: sets the options that keep the function, and checks it",
        ("paper", "static"),
    )
    budget: float | None = option(
        None, "train to this share of the dense cost in multiply-adds; blocks get gates (model option node_gate: hard)"
    )
    budget_per: str = option(
        "batch", "apply the budget to the mean of a batch, or to each sample: batch, sample", ("batch", "sample")
    )
    budget_strength: float = option(10.0, "weight of the budget loss")
    budget_rule: str = option(
        "penalty",
        "penalty: the budget loss alone, which settles a little above the budget; exact: besides, a multiplier that grows while"
        " too much is executed",
        ("penalty", "exact"),
    )
    budget_warmup: float = option(0.3, "share of training during which the target falls from 1 to --budget")
    compile: bool = option(False, "compile the network with torch.compile")
    channels_last: bool = option(False, "channels_last memory format")
    grad_checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory, more time")
    on_bad_image: str = option(
        "error",
        "what to do with an image that does not decode: error ends the run; skip lists it in bad_images.txt",
        ("error", "skip"),
    )
    max_bad_images: int = option(100, "with --on-bad-image skip: more bad images than this end the run")
    cache: bool = option(False, "decode all images once and augment them on the device; for small images")

    command: ClassVar[str] = "train"

    def check(self) -> None:
        """Raises UsageError for a value that is not allowed."""
        from dgnet.data import is_stream

        check_bounds(self, _TRAIN_BOUNDS)
        self.check_phases(self.epochs)
        if self.epochs % self.evaluate_every:
            raise UsageError(
                f"--evaluate-every {self.evaluate_every} leaves out the last of {self.epochs} epochs; use a divisor of --epochs"
            )
        if self.start == "static" and self.weights is None:
            raise UsageError("--start static has no effect without --weights; add --weights FILE, or leave out --start")
        if self.holdout and self.val_data:
            raise UsageError("--holdout replaces --val-data; leave one of them out (a recipe's: --val-data null)")
        self.check_start(self.weights)
        if self.freeze_epochs is not None and self.freeze_epochs >= self.epochs:
            raise UsageError(
                f"--freeze-epochs {self.freeze_epochs} is not below --epochs {self.epochs}; leave it out to train nothing else"
            )
        if self.aug_repeats > 1 and is_stream(self.data):
            raise UsageError("--aug-repeats needs images that can be read in any order, and --data is a stream; leave it out")
        for name, option_name in _NETWORK_OPTIONS.items():
            if getattr(self, name) is not None and option_name in self.model_kwargs:
                raise UsageError(f"{flag(name)} and --model-kwargs.{option_name} are the same; leave one of them out")
        if self.cache and (self.augment == "rrc" or self.workers or self.devices != "1" or self.nodes != 1):
            raise UsageError("--cache true needs --devices 1, --nodes 1, --workers 0 and another --augment than rrc")
        if self.cache and (self.on_bad_image == "skip" or is_stream(self.data)):
            raise UsageError(
                "--cache true decodes all images at the start; it cannot be combined with --on-bad-image skip or a stream"
            )

    def schedule(self) -> tuple[int, int]:
        return self.epochs, self.evaluate_every

    @property
    def network_kwargs(self) -> dict[str, Any]:
        gates = {} if self.budget is None else {"node_gate": "hard"}
        own = {option: getattr(self, name) for name, option in _NETWORK_OPTIONS.items() if getattr(self, name) is not None}
        return {**gates, **super().network_kwargs, **own}

    def find_option(self, network_option: str) -> str | None:
        """The option here that sets an option of the network, as it is typed, with its value; None if none was given."""
        names = (name for name, option in _NETWORK_OPTIONS.items() if option == network_option)
        return next((f"{flag(name)} {getattr(self, name)}" for name in names if getattr(self, name) is not None), None)
