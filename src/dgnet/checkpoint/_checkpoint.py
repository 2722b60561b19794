"""Checkpoints: weights, the network that they are of, its classes and its preprocessing. Tensors and plain values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from dgnet.checkpoint._files import DESCRIPTION, damaged, find_checkpoint, read_tensors, save_tensors
from dgnet.checkpoint._fit import load_state
from dgnet.code import import_packages
from dgnet.data import Preprocessing, check_max_pixels
from dgnet.errors import UsageError, check_choice, check_range
from dgnet.files import writing
from dgnet.graph import accept_cuts, find_stages
from dgnet.models import TimmNetwork, check_finite, create_model, static_counterpart
from dgnet.typed import Label, Location, read_entry, read_fields, read_value

CLASSIFY, DETECT = "classify", "detect"
"""The tasks of checkpoints."""


_COMMANDS = {CLASSIFY: "dgnet", DETECT: "dgnet detect"}


_ADVICE = {
    CLASSIFY: "name the model with --model NAME, or start from it with: dgnet train --weights FILE",
    DETECT: "start from it with: dgnet detect train --weights FILE",
}  # for a file of weights only


NOT_STORED = ("num_classes", "in_chans", "pretrained", "checkpoint_path", "features_only")
"""Model options that a checkpoint cannot hold, because they follow from it."""

IMPORTS = "imports"
"""The entry of a description with the packages of `--import`, if one of them registers the network with timm."""


@dataclass(frozen=True)
class Described:
    """The content of a checkpoint for any task."""

    path: Path
    state_dict: dict[str, Tensor]  # the network's own keys
    model: str
    model_kwargs: dict[str, Any]
    class_names: list[str]
    config: dict[str, Any]  # the run's configuration
    imports: list[str] = field(default_factory=list, kw_only=True)  # packages of the user's own that register the network

    task: ClassVar[str]  # CLASSIFY or DETECT

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a checkpoint from a run folder (its last one), a .ckpt file, or a model.safetensors.

        Raises UsageError for a file that is missing, truncated or damaged, that holds pickled code, or that is no checkpoint
        of dgnet for this task.
        """
        path = find_checkpoint(path)
        return cls.of(path, *read_tensors(path))

    @classmethod
    def of(cls, path: Path, state_dict: dict[str, Tensor], carried: dict[str, Any] | None) -> Self:
        """The checkpoint in the file `path`, whose content `read_tensors` gave. Raises UsageError as `read` does."""
        carried = _check_task(path, carried, cls.task)
        with damaged(path):
            return cls(path=path, state_dict=state_dict, **cls.read_description(carried))

    @classmethod
    def read_description(cls, carried: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that `carried` describes. Raises UsageError for a value that is missing or of another type."""
        kinds = {"model": str, "model_kwargs": dict[str, Any], "class_names": list[Label], "config": dict[str, Any]}
        values = {name: read_entry(carried, name, kind, DESCRIPTION) for name, kind in kinds.items()}
        values["imports"] = read_value(list[str], carried.get(IMPORTS, []), f"{DESCRIPTION}: {IMPORTS}")
        for name in NOT_STORED:
            if name in values["model_kwargs"]:
                raise UsageError(f"{DESCRIPTION}: model_kwargs sets {name}, which follows from the checkpoint")
        if not values["class_names"]:
            raise UsageError(f"{DESCRIPTION} names no classes")
        return values

    def create_network(self, **options: Any) -> TimmNetwork:
        """The network as described, untrained. Raises UsageError, which names the checkpoint, if it cannot be built.

        Packages of the user's own that register it are imported first, if they are trusted; see `dgnet.code`.
        """
        try:
            import_packages(self.imports, "its network")
            with accept_cuts():
                return create_model(self.model, **options, **self.model_kwargs)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from None

    def load_into(self, network: nn.Module, misfit: str) -> None:
        """Load the weights. Raises UsageError if they do not fit, which `misfit` says in words, or are not finite."""
        with damaged(self.path):
            difference = load_state(network, self.state_dict)
            if difference:
                raise UsageError(f"its weights {misfit} ({difference})")
            check_finite(self.state_dict)


@dataclass(frozen=True)
class Checkpoint(Described):
    """The content of a checkpoint of `dgnet train`."""

    preprocessing: Preprocessing

    task = CLASSIFY

    @classmethod
    def read_description(cls, carried: Mapping[str, Any]) -> dict[str, Any]:
        values = super().read_description(carried)
        stored = read_entry(carried, "preprocessing", dict[str, Any], DESCRIPTION)
        return {**values, "preprocessing": read_fields(Preprocessing, stored, f"{DESCRIPTION}: preprocessing")}

    @property
    def data(self) -> RunData:
        """Where the images of the run are. Raises UsageError if the checkpoint does not say."""
        return read_run_data(RunData, self)

    def build_network(self) -> TimmNetwork:
        """The trained network, in evaluation mode. Raises UsageError if the weights do not fit the model."""
        network = self.create_network(num_classes=len(self.class_names), **self.preprocessing.network_options)
        self.load_into(network, f"are not those of {self.model}")
        return network.eval()

    def build_dynamic(self) -> TimmNetwork:
        """As `build_network`. Raises UsageError for a static network."""
        network = self.build_network()
        if not find_stages(network):
            raise UsageError(
                f"{self.path} is of {self.model}, a static network: it has no routed edges to analyse;"
                " use a checkpoint of a model whose name begins with dg_, or of a run with --dynamic true"
            )
        return network

    def build_static(self) -> TimmNetwork | None:
        """The static baseline, untrained: the model without `dg_`, with the same classes and sizes. None if there is none."""
        static = static_counterpart(self.model, self.model_kwargs)
        if static is None:
            return None
        name, options = static
        sizes: dict[str, Any] = {"num_classes": len(self.class_names), **self.preprocessing.network_options}
        return create_model(name, **sizes, **options).eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint as a safetensors file. Raises UsageError if the file cannot be written."""
        carried = describe_network(
            self.model, self.model_kwargs, self.class_names, self.preprocessing, self.config, self.imports
        )
        with writing(path, "name another file"):
            save_tensors(self.build_network().state_dict(), path, carried)


D = TypeVar("D")


@dataclass(frozen=True)
class RunData:
    """Where a run of `dgnet train` had its images: the options of the same names. Raises UsageError for other values."""

    data: Location
    val_data: Location | None = None
    data_root: Location = "data"
    holdout: int = 0
    on_bad_image: str = "error"
    max_pixels: float | None = None

    def __post_init__(self) -> None:
        check_range("holdout", self.holdout, 0)
        check_choice("on_bad_image", self.on_bad_image, ("error", "skip"))
        check_max_pixels("max_pixels", self.max_pixels)


def read_run_data(kind: type[D], checkpoint: Described) -> D:
    """What the dataclass `kind` holds of the configuration of a checkpoint's run. Raises UsageError if it is not there."""
    if not checkpoint.config:
        raise UsageError(f"{checkpoint.path} does not say where the data of its run is; name data with --data")
    own = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    with damaged(checkpoint.path):
        stored = {name: value for name, value in checkpoint.config.items() if name in own}
        return read_fields(kind, stored, "the configuration of its run")


def describe_network(
    model: str,
    model_kwargs: dict[str, Any],
    class_names: list[str],
    preprocessing: Preprocessing,
    config: dict[str, Any],
    imports: Sequence[str] = (),
) -> dict[str, Any]:
    """The description of a network, plain values that a checkpoint stores under the key "dgnet"."""
    return {
        "model": model,
        "model_kwargs": model_kwargs,
        "class_names": class_names,
        "preprocessing": preprocessing.to_dict(),
        "config": config,
        **({IMPORTS: list(imports)} if imports else {}),
    }


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of `dgnet train` from a run folder (its last one), a .ckpt file, or a model.safetensors.

    Raises UsageError for a file that is missing, truncated or damaged, that holds pickled code, or that is no checkpoint of
    `dgnet train`.
    """
    return Checkpoint.read(path)


def _check_task(path: Path, carried: dict[str, Any] | None, task: str) -> dict[str, Any]:
    """The description `carried` by a file, which must be for `task`. Raises UsageError if it is not, or if there is none."""
    if carried is None:
        raise UsageError(f"{path} holds weights only, without the model's name and classes; {_ADVICE[task]}")
    own = carried.get("task", CLASSIFY)
    if own not in (CLASSIFY, DETECT):
        raise UsageError(f"{path} is of the unknown task {own!r}; this version has the tasks {CLASSIFY} and {DETECT}")
    if own != task:
        raise UsageError(
            f"{path} is a checkpoint of {_COMMANDS[own]} train, not of {_COMMANDS[task]} train;"
            f" use it with: {_COMMANDS[own]} evaluate"
        )
    return carried
