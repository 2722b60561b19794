"""A residual block as a node: what it adds to its input.

Letters: B batch, C channels, H and W height and width, L tokens.
"""

from __future__ import annotations

from typing import Any

from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block as TransformerBlock
from torch import Tensor, nn

from dgnet.compat.timm import EFFICIENTNET_BLOCKS
from dgnet.compat.torch import has_any_hooks


class Increment(nn.Module):
    """f(x) = block(x) - x of a block that keeps the shape: (B, C, H, W), (B, H, W, C) or (B, L, C).

    Where the block's shortcut can be left out, f is computed without it: nothing is added that is then subtracted again. `form`
    says how: "skip" for timm's blocks with `has_skip`, "convnext", "transformer", and "difference" for all others, also for
    blocks with hooks or with a forward pass of their own.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.form = _find_form(block)

    def forward(self, x: Tensor, *further: Any, **named: Any) -> Tensor:
        """f(x). `further`, `named`: what the block is called with besides x."""
        block: Any = self.block
        y: Tensor
        if self.form == "skip":
            y = block.drop_path(block(x, *further, **named))
        elif further or named:
            y = block(x, *further, **named) - x
        elif self.form == "convnext":
            y = _convnext_branch(block, x)
        elif self.form == "transformer":
            attended = block.drop_path1(block.ls1(block.attn(block.norm1(x)))).to(x.dtype)  # under autocast it is narrower
            y = attended + block.drop_path2(block.ls2(block.mlp(block.norm2(x + attended))))
        else:
            y = block(x) - x
        return y

    def take_block(self) -> nn.Module:
        """The block with its shortcut, for a static network. This module must not be used afterwards."""
        if self.form == "skip":
            self.block.has_skip = True  # type: ignore[assignment]
        return self.block


def _find_form(block: Any) -> str:
    """See `Increment`. A block with `has_skip` loses its shortcut here."""
    if has_any_hooks(block) or "forward" in vars(block):
        return "difference"
    may_skip = type(block).__module__ == EFFICIENTNET_BLOCKS and getattr(block, "has_skip", None) is True
    if may_skip and isinstance(getattr(block, "drop_path", None), nn.Module):
        block.has_skip = False
        return "skip"
    if type(block) is ConvNeXtBlock and isinstance(block.shortcut, nn.Identity):
        return "convnext"
    return "transformer" if type(block) is TransformerBlock else "difference"


def _convnext_branch(block: Any, x: Tensor) -> Tensor:
    """timm's `ConvNeXtBlock.forward` without the shortcut."""
    y = block.conv_dw(x)
    y = y if block.use_conv_mlp else y.permute(0, 2, 3, 1)  # (B, H, W, C)
    y = block.mlp(block.norm(y))
    y = y if block.use_conv_mlp else y.permute(0, 3, 1, 2)  # back to (B, C, H, W)
    if block.gamma is not None:
        y = y.mul(block.gamma.reshape(1, -1, 1, 1))
    branch: Tensor = block.drop_path(y)
    return branch
