"""Where the pixels of padded images lie: a batch of images of several sizes is padded to the largest.

Letters: B batch, n samples that are computed on, C channels, H and W height and width of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgnet.graph._weighting import global_average_pool


class ValidArea:
    """The top left part of each image of a padded batch that holds its pixels.

    `sizes`: height and width of each image; `padded`: those of the batch. Of a map at another resolution the valid part is
    what strided convolutions make of it: ceil(h · H / padded height) rows.

    `rows`: the samples that a map holds, (n,); None for all. An executor that gathers samples sets it.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> None:
        self.sizes, self.padded = sizes, padded
        self.rows: Tensor | None = None
        self._masks: dict[tuple[int, int], Tensor] = {}

    def mask(self, feature: Tensor) -> Tensor:
        """1 where a map, (n, C, H, W), holds pixels of its image and 0 in the padding: (n, 1, H, W), of the map's type."""
        height, width = feature.shape[2:]
        if (height, width) not in self._masks:
            ends = [
                torch.tensor([-(-size[axis] * length // self.padded[axis]) for size in self.sizes], device=feature.device)
                for axis, length in enumerate((height, width))
            ]
            rows, columns = (
                torch.arange(length, device=feature.device) < end[:, None]
                for length, end in zip((height, width), ends, strict=True)
            )
            self._masks[height, width] = (rows[:, :, None] & columns[:, None, :])[:, None]
        mask = self._masks[height, width]
        return (mask if self.rows is None else mask[self.rows]).to(feature.dtype)

    def share(self, feature: Tensor) -> Tensor:
        """The share of a map, (n, C, H, W), that holds pixels: (n,)."""
        return self.mask(feature).flatten(1).mean(1, dtype=torch.float32)

    def pool(self, feature: Tensor, pool: Callable[[Tensor], Tensor] = global_average_pool) -> Tensor:
        """`pool` of each sample's valid part, (n, C, H, W) -> (n, C)."""
        mask = self.mask(feature)
        if pool is global_average_pool:
            return pool(feature * mask) / self.share(feature)[:, None]
        ends = zip(mask[:, 0, :, 0].sum(1).tolist(), mask[:, 0, 0].sum(1).tolist(), strict=True)
        parts = [pool(sample[None, :, : int(h), : int(w)]) for sample, (h, w) in zip(feature, ends, strict=True)]
        return torch.cat(parts)
