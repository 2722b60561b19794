"""The interface that timm's networks share, as a type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:

    class TimmNetwork(nn.Module):
        """The attributes and methods that the package uses of a network, timm's or its own. `create_model` returns one.

        It exists for type checkers only: timm has no such class, and Python has no type for "nn.Module with a protocol".
        """

        pretrained_cfg: dict[str, Any]
        """timm's description: input_size, mean, std, crop_pct, first_conv, classifier, …"""
        num_classes: int
        num_features: int
        """Channels before pooling."""
        feature_info: Any
        """For each feature map that the network can return: num_chs, reduction, module."""

        def forward(self, x: Tensor) -> Tensor: ...

        def __call__(self, x: Tensor) -> Tensor: ...

        def forward_features(self, x: Tensor) -> Tensor: ...

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor: ...

        def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
        ) -> Any: ...

        def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
        ) -> list[int]: ...

        def get_classifier(self) -> nn.Module: ...

        def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None: ...

        def set_grad_checkpointing(self, enable: bool = True) -> None: ...

        def group_matcher(self, coarse: bool = False) -> dict[str, Any]: ...

else:
    TimmNetwork = nn.Module
