"""Features that are computed again in the backward pass, because what they were computed from is kept anyway.

The feature of a node is often the output of a batch normalisation, x = γ(z − μ)/σ + β. The aggregation keeps x for the
gradients of its weights (`dgnet::aggregate`), and the normalisation keeps z, μ and σ for its own. Here the aggregation keeps
the latter too, which costs nothing, and x is computed again when the backward pass first reads it.

Letters: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from dgnet.compat.torch import KeptByNorm, can_pack_saved_tensors, find_norm

_FOUND = WeakTensorKeyDictionary()  # feature -> NormalizedFeature, while a pass holds the feature


class NormalizedFeature:
    """A feature that is computed again, once for all its readers, from what its batch normalisation has kept."""

    def __init__(self, norm: KeptByNorm) -> None:
        self.norm = norm
        self.versions = self._read_versions()
        self.readers = 0  # how often the backward pass reads the feature
        self.unread = 0  # how often it will still do so
        self.feature: Tensor | None = None  # while there are such readers

    def add_reader(self) -> NormalizedFeature:
        """This feature, for one more reader."""
        self.readers += 1
        return self

    def read(self) -> Tensor:
        """The feature, (B, C, H, W). Raises RuntimeError if the normalisation has changed since, as autograd does."""
        if self.feature is None:
            if self._read_versions() != self.versions:
                raise RuntimeError(
                    "parameters or statistics of a batch normalisation were modified by an inplace operation between the"
                    " forward pass and the backward pass"
                )
            with torch.no_grad():
                self.feature = self.norm.compute_output()
            self.unread = self.readers
        feature = self.feature
        self.unread -= 1
        if not self.unread:
            self.feature = None
        return feature

    def _read_versions(self) -> tuple[int, ...]:
        _, mean, variance, weight, bias, _ = self.norm
        return tuple(tensor._version for tensor in (mean, variance, weight, bias) if tensor is not None)


def keep_inputs_of_norms(features: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Inside the `with` block autograd keeps what `features` are computed again from, where it would keep one of them.

    This holds for features that are outputs of a batch normalisation and nothing else. Where autograd's graph is handled by
    somebody else, as by gradient checkpointing, all are kept as they are.
    """
    if not can_pack_saved_tensors():
        return nullcontext()
    found = {feature.data_ptr(): normalized for feature in features if (normalized := _find(feature)) is not None}
    return saved_tensors_hooks(partial(_pack, found), _unpack) if found else nullcontext()


def _pack(found: Mapping[int, NormalizedFeature], tensor: Tensor) -> Tensor | NormalizedFeature:
    normalized = found.get(tensor.data_ptr())
    return tensor if normalized is None else normalized.add_reader()


def _unpack(packed: Tensor | NormalizedFeature) -> Tensor:
    return packed.read() if isinstance(packed, NormalizedFeature) else packed


def _find(feature: Tensor) -> NormalizedFeature | None:
    """What `feature` can be computed again from; None if it is no output of a batch normalisation."""
    if feature in _FOUND:
        found: NormalizedFeature = _FOUND[feature]
        return found
    norm = find_norm(feature)
    if norm is None:
        return None
    _FOUND[feature] = normalized = NormalizedFeature(norm)
    return normalized
