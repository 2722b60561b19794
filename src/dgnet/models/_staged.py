"""timm's interface for networks of our own: stem, stages, neck (the layers after the stages), pooling, classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn

from dgnet.errors import check_range
from dgnet.models._protocol import TimmNetwork
from dgnet.models._state import LoadsWrapped
from dgnet.typed import read_value


def take_indices(num_features: int, indices: int | Sequence[int] | None) -> list[int]:
    """Indices of features in timm's form: None for all, a number n for the last n, or indices, negative ones from the end.

    Raises ValueError for an index that no feature has.
    """
    if indices is None:
        return list(range(num_features))
    wanted = range(-indices, 0) if isinstance(indices, int) else indices
    if indices == 0 or not all(-num_features <= index < num_features for index in wanted):
        raise ValueError(f"there are {num_features} features, got indices {indices}")
    return [index % num_features for index in wanted]


_LARGEST_SIZE = 10_000
"""Of layers and channels; no machine holds such a network."""


def read_sizes(name: str, sizes: Any, kind: Any) -> list[int]:
    """One whole number for each stage, as a list. `kind`: the type that the option `name` has, such as list[int].

    Raises UsageError for other values.
    """
    is_listed = isinstance(sizes, Iterable) and not isinstance(sizes, str)
    read = list(read_value(kind, list(sizes) if is_listed else sizes, name))
    for size in read:
        check_range(name, size, 1, _LARGEST_SIZE)
    return read


class StagedNetwork(LoadsWrapped, TimmNetwork):
    """A network that runs the children named in `stem_names`, `stage_names` and `neck_names` one after the other.

    Subclasses build those children and `feature_info` (the stem first, then the stages), then call `build_head`.
    """

    stem_names: tuple[str, ...]
    stage_names: tuple[str, ...]  # layer1, layer2, …
    neck_names: tuple[str, ...] = ()
    feature_info: list[dict[str, Any]]
    num_features: int
    grad_checkpointing = False
    global_pool: Any  # timm's pooling
    fc: nn.Module

    def build_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Pooling and classifier over `num_features` channels."""
        self.drop_rate = drop_rate
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def init_weights(self) -> None:
        """Convolutions as He et al. (2015), normalisations as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, each block, neck."""
        stage = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        groups: dict[str, Any] = {"stem": "^" + "|".join(self.stem_names), "blocks": stage}
        if self.neck_names:
            groups["blocks"] = [(stage, None), ("|".join(self.neck_names), (99999,))]
        return groups

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Build a new last layer for `num_classes`; with 0 the network returns pooled features."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.build_head(num_classes, pool, self.drop_rate)
        first = next(self.parameters())
        self.global_pool.to(first.device, first.dtype)
        self.fc.to(first.device, first.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last feature, and those of stem and stages, as in timm: index 0 is the stem, the stages follow.

        The stages run one after the other: T(X) = F_K(… F_2(F_1(X))), Eq. (2).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        x, intermediates = self.run_layers(x, self.start_pass(x), indices, stop_early, not intermediates_only)
        return intermediates if intermediates_only else (x, intermediates)

    def start_pass(self, images: Tensor) -> Callable[[str, Tensor], Tensor]:
        """What runs the stage of a name on a feature, in one forward pass of `images`."""

        def run(name: str, x: Tensor) -> Tensor:
            stage = getattr(self, name)
            has_blocks = isinstance(stage, nn.Sequential)  # not if `prune_intermediate_layers` has removed it
            feature: Tensor = checkpoint_seq(stage, x) if self.grad_checkpointing and has_blocks else stage(x)
            return feature

        return run

    def run_layers(
        self,
        x: Tensor,
        run: Callable[[str, Tensor], Tensor],
        indices: int | Sequence[int] | None = (),
        stop_early: bool = False,
        with_neck: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward_intermediates`. `run`: of `start_pass`."""
        take = take_indices(len(self.feature_info), indices)
        last = max(take, default=len(self.stage_names))
        for name in self.stem_names:
            x = getattr(self, name)(x)
        intermediates = [x] if 0 in take else []
        for index, name in enumerate(self.stage_names[: last if stop_early else None], start=1):
            x = run(name, x)
            if index in take:
                intermediates.append(x)
        if with_neck and (not stop_early or last == len(self.stage_names)):
            for name in self.neck_names:
                x = getattr(self, name)(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one in `indices`, and the head, as in timm."""
        take = take_indices(len(self.feature_info), indices)
        last = max(take)
        is_cut = last < len(self.stage_names)
        dropped = [*self.stage_names[last:], *(self.neck_names if is_cut or prune_head else ())]
        for name in dropped:
            setattr(self, name, nn.Identity())
        if dropped:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """The feature before pooling: (B, num_features, H, W)."""
        return self.run_layers(x, self.start_pass(x))[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier: (B, num_classes), or the pooled features if `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
