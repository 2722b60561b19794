"""φ of Eq. (4), the pooling of a feature for a router, and the area of a padded batch that holds the images.

Letters: B batch, n samples that a map holds, C channels, H and W height and width of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dgnet.graph._context import ContextStack


def global_average_pool(feature: Tensor) -> Tensor:
    """φ of Eq. (4): (B, C, H, W) -> (B, C), at least in float32."""
    # Not `mean`: its backward pass writes a map in another memory format than the feature's; that of `sum` returns a view.
    height, width = feature.shape[2:]
    return feature.sum((2, 3), dtype=torch.promote_types(feature.dtype, torch.float32)) / (height * width)


class ValidArea:
    """For each image of a padded batch, the top left part that holds its pixels.

    `sizes`: height and width of each image; `padded`: height and width of the batch. On a map of another resolution the valid
    part has the size that strided convolutions give it: ceil(h · H / padded height) rows.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> None:
        self.sizes, self.padded = sizes, padded
        self.rows: Tensor | None = None
        self.shares: dict[int, Tensor] = {}  # of maps that are being averaged, by the id of the module that reads their mean
        self._masks: dict[tuple[int, int], Tensor] = {}

    def select(self, rows: Tensor | None) -> ValidArea:
        """The area of maps that hold only the samples `rows`, (n,), of those that this area is of; None: all of them."""
        if rows is None:
            return self
        selected = ValidArea(self.sizes, self.padded)
        selected.rows = rows if self.rows is None else self.rows[rows]
        selected._masks = self._masks
        return selected

    def mask(self, feature: Tensor) -> Tensor:
        """1 where a map, (n, C, H, W), holds pixels of its image and 0 in the padding: (n, 1, H, W), in the map's dtype."""
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
        """The fraction of a map, (n, C, H, W), that holds pixels of its image: (n,)."""
        return self.mask(feature).flatten(1).mean(1, dtype=torch.float32)

    def pool(self, feature: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """`pool` of each sample's valid part, (n, C, H, W) -> (n, C)."""
        mask = self.mask(feature)
        if pool is global_average_pool:
            return pool(feature * mask) / self.share(feature)[:, None]
        valid = mask[:, 0] > 0  # counted as bool: half precision holds whole numbers to 256 or 2048 only
        ends = zip(valid[:, :, 0].sum(1).tolist(), valid[:, 0].sum(1).tolist(), strict=True)
        parts = [pool(sample[None, :, :h, :w]) for sample, (h, w) in zip(feature, ends, strict=True)]
        return torch.cat(parts)


_AREAS: ContextStack[ValidArea | None] = ContextStack("valid_area")


def current_area() -> ValidArea | None:
    """The valid area of the current batch; None if no image is padded."""
    areas = _AREAS.values()
    return areas[-1] if areas else None


def use_area(area: ValidArea | None) -> AbstractContextManager[None]:
    """Set the valid area of the batch that is processed inside the `with` block; None: no image is padded."""
    return _AREAS.hold(area)


def select_samples(area: ValidArea | None, rows: Tensor | None) -> AbstractContextManager[None]:
    """Inside the `with` block maps hold only the samples `rows`, (n,), of the batch that `area` describes; None: all."""
    return nullcontext() if area is None else use_area(area.select(rows))


def without_autocast(feature: Tensor) -> torch.autocast:
    """Inside the `with` block routing computes in the precision of what it gets. (The meta device has no autocast.)"""
    return torch.autocast("cpu" if feature.is_meta else feature.device.type, enabled=False)


def pool_feature(feature: Tensor, pool: Callable[[Tensor], Tensor] = global_average_pool) -> Tensor:
    """φ(x) of Eq. (4), over the valid area if there is one: (n, C, H, W) -> (n, C), in float32 at least."""
    area = current_area()
    pooled = pool(feature) if area is None else area.pool(feature, pool)
    return pooled.to(torch.promote_types(pooled.dtype, torch.float32))
