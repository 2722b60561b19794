"""Distillation: a trained network that the trained one follows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from dgnet.checkpoint import create_pretrained, find_checkpoint, load_checkpoint, read_tensors
from dgnet.data import Preprocessing, compose, imagenet_classes
from dgnet.errors import UsageError, reason
from dgnet.models import TimmNetwork, create_model, match_image_size, static_counterpart
from dgnet.paths import absolute
from dgnet.training._config import TrainConfig
from dgnet.training._config_finetuning import ORIGINAL
from dgnet.training._head import load_start, settle_head


@dataclass(eq=False)
class Teacher:
    """A network in evaluation mode, whose probabilities another network follows (Hinton et al., 2015).

    `scale` and `shift`, (C, 1, 1): from images that are normalised for the other network to its own; None if they are the same.
    It is no module: checkpoints do not store it.
    """

    network: TimmNetwork
    temperature: float
    scale: Tensor | None = None
    shift: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # the moving average of the weights copies everything else

    def to(self, device: torch.device) -> None:
        """Move the network to `device`."""
        self.network.to(device)
        if self.scale is not None and self.shift is not None:
            self.scale, self.shift = self.scale.to(device), self.shift.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The teacher's logits, (B, K)."""
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        return self.network(images)

    def losses(self, logits: Tensor, images: Tensor) -> Tensor:
        """For each image, (B,): T² · KL(teacher ‖ other network), both at temperature T. `logits`: of the other network."""
        own = F.log_softmax(logits.float() / self.temperature, dim=1)
        followed = F.log_softmax(self(images).float() / self.temperature, dim=1)
        return F.kl_div(own, followed, reduction="none", log_target=True).sum(1) * self.temperature**2

    def fingerprint(self) -> str:
        """A digest of the weights. A run that continues with another teacher would silently give another result."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def build_teacher(config: TrainConfig, class_names: Sequence[str], preprocessing: Preprocessing) -> Teacher:
    """The teacher of `config`. `class_names`, `preprocessing`: of the data and of the network that is trained.

    Raises UsageError for a teacher that cannot be found or loaded, that has other classes, or that cannot read the images.
    """
    asked = f"--teacher {config.teacher}"
    options = preprocessing.network_options
    own_preprocessing = preprocessing
    if config.teacher == ORIGINAL:
        network = _load_static(config, asked, config.weights, class_names, options)
    elif timm.is_model(str(config.teacher).partition(".")[0]):
        name = str(config.teacher)
        sized, _ = match_image_size(name, {}, max(preprocessing.image_size))
        network = create_pretrained(name, asked, "--teacher RUN", **options, **sized)
        if network.num_classes == len(class_names):
            settle_head(network, [], class_names, imagenet_classes(len(class_names)))
        own_preprocessing = Preprocessing.of(network.pretrained_cfg, in_chans=len(preprocessing.mean))
    elif _is_described(asked, str(config.teacher)):
        checkpoint = load_checkpoint(str(config.teacher))
        known, needed = ([compose(name) for name in names] for names in (checkpoint.class_names, class_names))
        if sorted(known) != sorted(needed):
            raise _other_classes(asked, f"{len(known)} classes ({known[0]}, …)", f"{len(needed)} ({needed[0]}, …)")
        network, own_preprocessing = checkpoint.build_network(), checkpoint.preprocessing
        settle_head(network, [], class_names, checkpoint.class_names)
        if len(own_preprocessing.mean) != len(preprocessing.mean):
            channels = [len(one.mean) for one in (own_preprocessing, preprocessing)]
            raise UsageError(f"{asked} reads {channels[0]}-channel images, and this run has {channels[1]}; see --in-chans")
    else:
        network = _load_static(config, asked, config.teacher, class_names, options)
    network.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, *preprocessing.input_shape))
    except Exception as error:  # a network may raise anything for a size that it cannot read
        size = "×".join(map(str, preprocessing.image_size))
        raise UsageError(f"{asked} cannot read images of {size} pixels ({reason(error)}); choose --image-size for it") from None
    if logits.shape[1] != len(class_names):
        raise _other_classes(asked, f"{logits.shape[1]} classes", str(len(class_names)))
    return Teacher(network, config.teacher_temperature, *_renormalisation(preprocessing, own_preprocessing))


def absolute_teacher(teacher: str | None) -> str | None:
    """`teacher` as a run stores it: a path is found from every folder."""
    if teacher is None or teacher == ORIGINAL or timm.is_model(teacher.partition(".")[0]):
        return teacher
    return absolute(teacher)


def _is_described(asked: str, path: str) -> bool:
    """Whether the checkpoint `path` says what its network is. Raises UsageError if there is none."""
    try:
        return read_tensors(find_checkpoint(path))[1] is not None
    except UsageError as error:
        raise UsageError(f"{asked} is no run folder, checkpoint, or name of a model ({error})") from None


def _load_static(
    config: TrainConfig, asked: str, weights: str | None, class_names: Sequence[str], channels: dict[str, int]
) -> TimmNetwork:
    """The static form of the network that is trained, with `weights` from a file, or published ones if that is None."""
    name, options = static_counterpart(config.model, config.network_kwargs) or (config.model, config.network_kwargs)
    options = {**options, **channels}
    if weights is None:
        network = create_pretrained(name, asked, "--weights FILE", **options)
        if network.num_classes == len(class_names):
            settle_head(network, [], class_names, imagenet_classes(len(class_names)))
        return network
    network = create_model(name, num_classes=len(class_names), **options)
    try:
        untrained, _ = load_start(network, name, weights, class_names)
    except UsageError as error:
        raise UsageError(f"{asked} needs weights of {name} ({error})") from None
    if untrained:
        raise _other_classes(asked, f"other classes in {Path(weights).name}", str(len(class_names)))
    return network


def _other_classes(asked: str, found: str, needed: str) -> UsageError:
    return UsageError(
        f"{asked} was trained for {found}, and the data have {needed}; train a static network on these data first, and name its"
        " run: --teacher RUN"
    )


def _renormalisation(given: Preprocessing, wanted: Preprocessing) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift, (C, 1, 1) each, from images normalised as `given` to `wanted`; None if there is nothing to change."""
    if (given.mean, given.std) == (wanted.mean, wanted.std):
        return None, None
    mean, std, own_mean, own_std = (
        torch.tensor(values)[:, None, None] for values in (given.mean, given.std, wanted.mean, wanted.std)
    )
    return std / own_std, (mean - own_mean) / own_std
