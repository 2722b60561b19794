"""The configuration of `dgnet bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgnet.errors import UsageError
from dgnet.options import LARGEST_SIDE, MOST_THREADS, check_bounds, check_choices, option, read_options

DTYPES = ("float32", "bfloat16", "float16")  # as names, so that a help text needs no torch import
TASKS = ("train", "infer", "detect-train", "detect-infer")
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels, of a detector's images (§6.3)


@dataclass(frozen=True)
class BenchConfig:
    """What is measured. `against` None: the static baseline, the model's name without `dg_`, or itself if it is converted.

    "train" is a step of cross-entropy and SGD with momentum, with autocast if `dtype` is half precision. "infer" is a forward
    pass in evaluation mode, with batch normalisations folded into convolutions and weights in `dtype`. "detect-train" and
    "detect-infer" are the same for Faster R-CNN with a feature pyramid and 80 classes on the networks, with autocast, on images
    of `image_size` (800) × 1⅔ `image_size` (1333) pixels.

    Raises UsageError for an invalid value.
    """

    model: str
    against: str | None = option(None, "the other network; by default the static baseline")
    task: str = option(
        "train", "train: a training step; infer: a forward pass, BN folded; detect-…: the same for Faster R-CNN on them", TASKS
    )
    batch_size: int = option(32, "images in a step")
    image_size: int | None = option(None, "side in pixels, of a detector the short one; by default the model's own, or 800")
    device: str = "cpu"
    dtype: str = option("float32", "float32, bfloat16 or float16; autocast in training", DTYPES)
    compile: bool = option(False, "compile both networks with torch.compile")
    cuda_graphs: bool = option(False, "compile with CUDA graphs, for small batches")
    channels_last: bool = option(True, "channels_last memory format")
    rounds: int = option(10, "rounds in which the two alternate")
    threads: int | None = option(None, "CPU threads of torch; by default torch's own choice")
    allocator: str = option(
        "keep",
        "memory that a step frees on the CPU; keep: for the next step; system: return it to the system",
        ("keep", "system"),
    )
    dynamic: bool = option(False, "convert MODEL, a static network of timm; by default against itself as it is")
    model_kwargs: dict[str, Any] = option({}, "options of MODEL, not of the other network")
    seed: int = 0

    def __post_init__(self) -> None:
        read_options(self)
        check_choices(self)
        check_bounds(self, dict.fromkeys(("batch_size", "rounds"), (1,)))
        check_bounds(self, {"threads": (1, MOST_THREADS), "image_size": (1, LARGEST_SIDE)})
        if self.against is None and not self.model.startswith("dg_") and not self.is_converted:
            raise UsageError(f"{self.model} has no static baseline; name the other model with --against, or use --dynamic true")
        if self.cuda_graphs and not (self.compile and self.device.startswith("cuda")):
            raise UsageError("--cuda-graphs needs --compile true and a CUDA device; leave it out")
        if self.is_detection and self.compile:
            raise UsageError(f"--task {self.task} does not go with --compile: a detector is no single graph; leave it out")
        if self.task == "train" and self.batch_size == 1:
            raise UsageError("--task train needs --batch-size 2 or more: batch normalisation does not train on one image")
        if self.is_training and self.dtype == "float16" and self.device == "cpu":
            raise UsageError("--dtype float16 cannot be trained on a CPU; use bfloat16 or float32")

    @property
    def is_converted(self) -> bool:
        """Whether MODEL is a static network that is converted."""
        return self.dynamic or bool(self.model_kwargs.get("dynamic", False))

    @property
    def is_training(self) -> bool:
        """Whether steps are training steps."""
        return self.task.endswith("train")

    @property
    def is_detection(self) -> bool:
        """Whether the networks are backbones of detectors."""
        return self.task.startswith("detect")


def image_width(task: str, height: int) -> int:
    """Width of an image in pixels: detector images have the paper's aspect ratio, others are square."""
    return round(height * LONG_SIDE / SHORT_SIDE) if task.startswith("detect") else height
