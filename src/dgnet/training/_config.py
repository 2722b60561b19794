"""What training can be asked for: frozen dataclasses, the source of the commands' options and of recipes.

A help text is printed from them. They import torch and timm only in the checks of a configuration, so that it comes at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dgnet.errors import UsageError, check_choice, check_range, reason
from dgnet.options import check_bounds, check_choices, option

if TYPE_CHECKING:
    from torch import nn

ROUTING_DECAY = ("weights", "all", "none")
_OWN_OPTIONS = ("weighting", "topology", "shortcut")

# What may differ where a run goes on: where data lie, what it takes place on. None of it decides the result.
RESUME_OPTIONS = (
    *("data", "val_data", "data_root", "images", "val_images", "accelerator", "devices", "nodes", "workers", "threads"),
    *("checkpoint_every", "max_bad_images"),
)

# Model options that the rest of the configuration decides, and how.
_TAKEN = {
    "num_classes": "it follows from the data",
    "in_chans": "images are read as RGB",
    "pretrained": "start from a file with --weights",
    "checkpoint_path": "start from a file with --weights",
    "features_only": "what is trained decides it",
    **{name: f"use --{name}" for name in _OWN_OPTIONS},
}

_BOUNDS: dict[str, tuple[float, ...]] = {
    "batch_size": (1,),
    "threads": (1,),
    "workers": (0,),
    "lr": (0,),
    "threshold_lr": (0,),
    "momentum": (0, 1),
    "weight_decay": (0,),
    "seed": (0, 2**32 - 1),
    "accumulate": (1,),
    "lr_batch_size": (1,),
    "clip_grad": (0,),
    "ema": (0, 1),
    "nodes": (1,),
    "hflip": (0, 1),
}


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, str | bool | int | float)


def _check_optimizer(name: str) -> None:
    """Raises UsageError for an optimiser that timm does not have, or that cannot be used."""
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    check_choice("--optimizer", name, map(str, list_optimizers()))
    if get_optimizer_info(name).second_order:
        raise UsageError(f"--optimizer {name} takes second derivatives, which training has not; use another")
    try:
        get_optimizer_class(name)
    except (AssertionError, ImportError) as error:
        raise UsageError(f"--optimizer {name} cannot be used here: {reason(error)}") from None


@dataclass(frozen=True)
class RunConfig:
    """What every training run can be asked for. Raises UsageError for a value that makes no sense."""

    model: str = option("dg_resnet20", "model name; names: dgnet models")
    weighting: str | None = option(None, "what edges weigh: routed (the default), learned, fixed")
    topology: str | None = option(
        None, "which edges exist: complete (the default), residual, chain, er, ba, ws; one a stage with commas"
    )
    shortcut: str | None = option(None, "where the residual shortcut is: edge (the default) or node")
    model_kwargs: dict[str, Any] = option(
        {}, "further model options as a dict; one by one, beside a recipe's: --model-kwargs.router_bias 0"
    )
    weights: str | None = option(None, "start from the weights in this file")
    output: str | None = option(None, "run folder, must not hold a run yet; by default the next free runs/MODEL-N")
    batch_size: int = option(32, "images in a training step, over all devices")
    seed: int = option(0, "seed of initialisation, order and augmentation")
    hflip: float = option(0.5, "probability of a horizontal flip; digits are never flipped")
    optimizer: str = option("sgd", "timm optimiser name; sgd has Nesterov momentum, momentum has not")
    accumulate: int = option(1, "batches of a device that make a step: --batch-size stays, memory falls")
    lr: float = option(0.1, "peak learning rate")
    lr_batch_size: int | None = option(
        None, "batch size that --lr is meant for: at another --batch-size it is scaled in proportion; by default never"
    )
    threshold_lr: float = option(1.0, "learning rate of the thresholds τ, as a share of --lr")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay; never on learned edge weights")
    norm_decay: bool = option(False, "normalisation and biases decay too")
    routing_decay: str = option(
        "weights", "what of the routing decays too: routers' weights, all (biases and thresholds too), none", ROUTING_DECAY
    )
    clip_grad: float | None = option(None, "clip the norm of all gradients together at this; by default never")
    ema: float | None = option(None, "decay of a moving average of the weights, which is what is evaluated and saved: 0.9999")
    precision: str = option("32", "arithmetic; bf16 and fp16 are autocast", ("32", "bf16", "fp16"))
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu")
    devices: str = option("1", "how many devices of a machine to train on; auto: all of them; torchrun knows by itself")
    nodes: int = option(1, "how many machines; torchrun knows by itself")
    sync_bn: bool = option(False, "batch normalisation over all devices (CUDA)")
    checkpoint_every: str = option(
        "15 minutes", "write checkpoints/last.ckpt so often, as '500 steps' or '15 minutes', and at each epoch's end"
    )
    loggers: list[dict[str, Any]] = option(
        [], "further Lightning loggers: [{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: NAME}}]"
    )
    workers: int = option(0, "processes that load images; 0 loads in the main process")
    threads: int | None = option(None, "CPU threads of torch; by default torch's own choice")

    command: ClassVar[str]
    """What trains as the configuration says, as it is typed after `dgnet`."""

    def __post_init__(self) -> None:
        check_choices(self)
        _check_optimizer(self.optimizer)
        check_bounds(self, _BOUNDS)
        if self.ema == 1 or self.clip_grad == 0:
            raise UsageError(f"--ema must be below 1 and --clip-grad above 0, got {self.ema} and {self.clip_grad}")
        if self.batch_size % self.accumulate:
            raise UsageError(f"--batch-size {self.batch_size} cannot be divided by --accumulate {self.accumulate}")
        self.checkpoint_interval()
        for logger in self.loggers:
            if not isinstance(logger.get("class_path"), str) or not logger.keys() <= {"class_path", "init_args"}:
                raise UsageError(f"--loggers takes {{class_path: …, init_args: {{…}}}}, got {logger}")
        if self.lr == 0:
            raise UsageError("--lr must be above 0, got 0")
        for name in _TAKEN.keys() & self.model_kwargs.keys():
            raise UsageError(f"--model-kwargs cannot set {name}: {_TAKEN[name]}")
        for name, value in self.model_kwargs.items():
            if not _is_plain(value):
                raise UsageError(
                    f"--model-kwargs {name} must be a number, text, truth value, or a list or dict of these,"
                    f" got {type(value).__name__}: a checkpoint carries plain values only"
                )

    @property
    def peak_lr(self) -> float:
        """The rate after warm-up: `lr`, in proportion to the batch size where `lr_batch_size` is given (Goyal et al., 2017)."""
        return self.lr * self.batch_size / self.lr_batch_size if self.lr_batch_size else self.lr

    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """Steps or seconds between checkpoints; the other is None. Raises UsageError for neither."""
        found = re.fullmatch(r"([\d.]+) *(steps?|min|minutes?)", self.checkpoint_every.strip())
        try:
            number = float(found[1]) if found else 0.0
        except ValueError:
            number = 0.0
        if not found or number <= 0 or (found[2].startswith("s") and number % 1):
            raise UsageError(f"--checkpoint-every must be like '500 steps' or '15 minutes', got {self.checkpoint_every!r}")
        return (int(number), None) if found[2].startswith("s") else (None, 60 * number)

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `create_model`: the axes, where given, and `model_kwargs`."""
        axes = {name: getattr(self, name) for name in _OWN_OPTIONS}
        return {**{name: value for name, value in axes.items() if value is not None}, **self.model_kwargs}

    def schedule(self) -> tuple[int, int]:
        """How many epochs there are, each a row of metrics.csv, and after how many of them an evaluation comes."""
        raise NotImplementedError

    def resolve(self, network: nn.Module) -> Self:
        """This configuration with what it left open of the network filled in: every value that decides the result."""
        options = dict(getattr(network, "connectivity_options", {}))
        axes = {name: options.pop(name) for name in _OWN_OPTIONS if name in options}
        return replace(self, model_kwargs={**self.model_kwargs, **options}, **axes)


_TRAIN_BOUNDS: dict[str, tuple[float, ...]] = {
    "epochs": (1,),
    "image_size": (1,),
    "holdout": (0,),
    "evaluate_every": (1,),
    "epoch_images": (1,),
    "crop_pct": (0.01, 1),
    "max_bad_images": (0,),
    "label_smoothing": (0, 1),
}


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A training run of a classifier. Raises UsageError for a value that makes no sense."""

    data: str = option(
        "digits",
        "training data: digits, a folder of class folders, shards (…{000..004}.tar, URLs and pipe: too), torch/…, hfds/…",
    )
    val_data: str | None = option(None, "evaluation data; not needed where --data holds both (train/ and val/)")
    epoch_images: int | None = option(None, "how many images of a stream (--data URL or pipe:) make an epoch")
    holdout: int = option(0, "evaluate on so many of the training images in place of --val-data, and train on the others")
    data_root: str = option("data", "folder in which torch/… and hfds/… data sets lie")
    epochs: int = option(20, "passes over the training images")
    evaluate_every: int = option(1, "evaluate after so many epochs; the last one must be among them")
    image_size: int | None = option(None, "side of the square input in pixels; by default the model's own, 16 for digits")
    crop_pct: float | None = option(
        None, "share of the short side that evaluation's centre crop keeps, 0.875 is 224 of 256; by default the model's own"
    )
    augment: str = option("auto", "auto: rrc above 64 pixels, pad-crop up to there", ("auto", "rrc", "pad-crop", "none"))
    warmup_epochs: float = option(1.0, "epochs of linear warm-up; a half-period cosine follows, by step")
    label_smoothing: float = option(0.0, "label smoothing of the training loss")
    budget: float | None = option(
        None, "hold the mean multiply-adds at this share of the dense cost; blocks get gates (model option node_gate: hard)"
    )
    budget_per: str = option("batch", "hold the budget on the mean of a batch, or for each sample", ("batch", "sample"))
    budget_strength: float = option(10.0, "weight of the budget's loss")
    budget_warmup: float = option(0.3, "share of training over which the budget falls from 1 to --budget")
    compile: bool = option(False, "compile the network with torch.compile")
    channels_last: bool = option(False, "channels_last memory format")
    grad_checkpointing: bool = option(False, "recompute nodes in the backward pass: less memory, more time")
    on_bad_image: str = option(
        "error", "an image that does not decode: an error, or skip it and list it in bad_images.txt", ("error", "skip")
    )
    max_bad_images: int = option(100, "more bad images than this end the run")
    cache: bool = option(False, "decode all images once and augment them on the device: for small images")

    command: ClassVar[str] = "train"

    def __post_init__(self) -> None:
        from dgnet.data import is_stream

        super().__post_init__()
        check_bounds(self, _TRAIN_BOUNDS)
        check_range("--warmup-epochs", self.warmup_epochs, 0, self.epochs)
        if self.epochs % self.evaluate_every:
            raise UsageError(
                f"--evaluate-every {self.evaluate_every} leaves out the last of {self.epochs} epochs; use a divisor of --epochs"
            )
        if self.holdout and self.val_data:
            raise UsageError("--holdout takes the place of --val-data; leave one out (a recipe's with --val-data null)")
        if self.cache and (self.augment == "rrc" or self.workers or self.devices != "1" or self.nodes != 1):
            raise UsageError("--cache true needs --devices 1, --nodes 1, --workers 0 and another --augment than rrc")
        if self.cache and (self.on_bad_image == "skip" or is_stream(self.data)):
            raise UsageError(
                "--cache true decodes all images at the start: it goes with neither --on-bad-image skip nor a stream"
            )

    def schedule(self) -> tuple[int, int]:
        return self.epochs, self.evaluate_every

    @property
    def network_kwargs(self) -> dict[str, Any]:
        gates = {} if self.budget is None else {"node_gate": "hard"}
        return {**gates, **super().network_kwargs}
