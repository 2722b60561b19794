"""The explorer: one HTML file that shows the path of each image through the network, at several threshold offsets.

Every figure on the page was measured; nothing is interpolated between offsets.

Letters: M images, O threshold offsets, E edges of all stages together.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from dgnet._cost import cost_model
from dgnet.analysis._layout import lay_out
from dgnet.analysis._sweep import OFFSETS, at_offset
from dgnet.data import IGNORED, EvaluationLoader, ImageDataset
from dgnet.errors import UsageError, check_range
from dgnet.evaluation import Batch, ImageByImage, Variant, find_image_size, run_pass
from dgnet.files import replace_file, writing
from dgnet.graph import Topology, find_stages, node_names
from dgnet.inference import find_threshold_offset, set_sparse

THUMBNAIL = 96
"""Longest side of a thumbnail, in pixels."""


@dataclass(frozen=True)
class Exploration:
    """The results of a network on M images at each of O threshold offsets."""

    own_offset: float  # the network's own; one of `offsets`
    offsets: tuple[float, ...]
    class_names: list[str]
    topologies: list[Topology]  # of each stage
    dense_multiply_adds: int  # for one image with every edge open
    names: list[str]  # each image's name: its path, or its place in a shard
    labels: list[int | None]  # None for an image without a label
    thumbnails: list[bytes]  # WebP
    predictions: Tensor  # (M, O), class indices
    confidences: Tensor  # (M, O), the probability of the predicted class
    losses: Tensor  # (M, O), cross-entropy; NaN without a label
    executed: Tensor  # (M, O), multiply-adds of the nodes that ran and the edges that were open
    weights: Tensor  # (M, O, E), as used in the aggregation, 0 where closed; in the order of `flatten_edges`

    @property
    def edges(self) -> list[list[tuple[int, int]]]:
        """For each stage its edges (sender i, receiver j), in the order of the receivers."""
        return [[(i, j) for j in range(t.num_nodes) for i in t.senders(j)] for t in self.topologies]


class _Selection(Dataset[tuple[Tensor, int, bytes]]):
    """The images of a data set at `indices`, each decoded once: tensor, label (or IGNORED), thumbnail."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int], classes: int) -> None:
        self.dataset, self.indices, self.classes = dataset, indices, classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bytes]:
        image, label = self.dataset.load(self.indices[index])
        is_label = isinstance(label, int) and 0 <= label < self.classes
        return self.dataset.transform(image), label if is_label else IGNORED, make_thumbnail(image)


def _collate(items: list[tuple[Tensor, int, bytes]]) -> tuple[Tensor, Tensor, list[bytes]]:
    images, labels, thumbnails = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), list(thumbnails)


def make_thumbnail(image: Image.Image) -> bytes:
    """A WebP image with sides of at most `THUMBNAIL` pixels."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()


def collect(
    network: nn.Module,
    dataset: ImageDataset,
    images: int = 1000,
    class_names: Sequence[str] | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    offsets: Sequence[float] = OFFSETS,
) -> Exploration:
    """Run `network` at each threshold offset on `images` images, spread evenly over `dataset`, whose transform is set.

    Each image is loaded once, and run once per offset in the sparse mode. The network's own offset is always added to
    `offsets`, and restored at the end. `class_names`: for the network's outputs, by default the data set's. A label that is
    None or not one of the classes counts as no label. The network is left on `device`, in evaluation and sparse mode.

    Raises UsageError for a network in which nothing can close, for an empty data set, for fewer class names than outputs, and
    for invalid sizes.
    """
    check_range("--images", images, 1)
    if not len(dataset):
        raise UsageError("the data set holds no images; name another with --data")
    names = list(dataset.class_names if class_names is None else class_names)
    count = min(images, len(dataset))
    indices = [index * len(dataset) // count for index in range(count)]
    loader = EvaluationLoader(_Selection(dataset, indices, len(names)), batch_size, workers, _collate)
    network = set_sparse(network.to(device).eval())
    own_offset = find_threshold_offset(network)
    with at_offset(network, own_offset):  # raises UsageError if nothing can close
        costs = cost_model(network, find_image_size(loader))
    meters = {offset: ImageByImage(costs) for offset in sorted({*offsets, own_offset})}
    collected = _Thumbnails(names)
    variants = [Variant([collected, meter], partial(at_offset, network, offset)) for offset, meter in meters.items()]
    run_pass(network, loader, variants=variants, device=device, desc="explore")
    found = [meter.summary() for meter in meters.values()]

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(figures, name) for figures in found], dim=1)  # (M, O, …)

    return Exploration(
        offsets=tuple(meters),
        own_offset=own_offset,
        class_names=names,
        topologies=[stage.topology for stage in find_stages(network)],
        dense_multiply_adds=costs.dense,
        names=[dataset.name(index) for index in indices],
        labels=[None if value == IGNORED else value for value in found[0].labels.tolist()],
        thumbnails=list(collected.thumbnails.values()),
        predictions=stack("predictions"),
        confidences=stack("confidences"),
        losses=stack("losses"),
        executed=stack("executed"),
        weights=stack("weights"),
    )


class _Thumbnails:
    """The meter that collects the thumbnails. Raises UsageError for a network with more outputs than `names`."""

    needs_connectivity = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.thumbnails: dict[int, bytes] = {}  # by the image's index

    def update(self, batch: Batch) -> None:
        """Add a batch. The same batch is added once per offset."""
        if batch.outputs.shape[1] > len(self.names):
            raise UsageError(f"the network has {batch.outputs.shape[1]} classes, but {len(self.names)} class names were given")
        self.thumbnails |= zip(batch.indices, batch.extras[0], strict=True)


def quantise(weights: Tensor) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], float, float]:
    """Weights as bytes, and the least and the greatest weight of an open edge.

    0 is a closed edge. A byte c ≥ 1 stands for least + (c - 1) · (greatest - least) / 254, so the error of an open edge's
    weight is at most (greatest - least) / 508.
    """
    values = weights.double().numpy()
    is_open = values != 0
    least, greatest = (float(values[is_open].min()), float(values[is_open].max())) if is_open.any() else (0.0, 0.0)
    steps = np.rint((values - least) * (254 / (greatest - least))) if greatest > least else np.zeros_like(values)
    return np.where(is_open, 1 + steps, 0).astype(np.uint8), least, greatest


def describe_exploration(found: Exploration, model: str, source: str) -> dict[str, Any]:
    """The data that the page reads, as plain values for JSON; for values of shape (M, O), one list per image."""
    codes, least, greatest = quantise(found.weights)
    stages = zip(found.topologies, found.edges, strict=True)
    return {
        "model": model,
        "source": source,
        "offsets": list(found.offsets),
        "class_names": found.class_names,
        "stages": [_describe_stage(topology, edges) for topology, edges in stages],
        "own_offset": found.own_offset,
        "dense_multiply_adds": found.dense_multiply_adds,
        "names": shorten_names(found.names),
        "labels": found.labels,
        "thumbnails": [base64.b64encode(thumbnail).decode() for thumbnail in found.thumbnails],
        "predictions": found.predictions.tolist(),
        "confidences": _rounded(found.confidences),
        "losses": _rounded(found.losses),
        "executed": found.executed.round().long().tolist(),
        "weights": {
            "codes": base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode(),  # (M, O, E)
            "least": least,
            "greatest": greatest,
        },
    }


def _describe_stage(topology: Topology, edges: list[tuple[int, int]]) -> dict[str, Any]:
    """The stage's graph, and for each edge, in the same order, the reach and the rise of its arc."""
    return {
        "num_nodes": topology.num_nodes,
        "names": node_names(topology.num_nodes),
        "edges": edges,
        "arcs": [(round(arc.reach, 4), round(arc.rise, 4)) for arc in lay_out(topology.mask)],
    }


def _rounded(values: Tensor) -> list[list[float | None]]:
    """Values rounded to four decimals; None if not finite."""
    return [[round(value, 4) if math.isfinite(value) else None for value in row] for row in values.tolist()]


def shorten_names(names: Sequence[str]) -> list[str]:
    """Names without the folders that all of them share, so that a shared page does not reveal local paths."""
    paths = [name.split("/") for name in names]
    shared = 0
    for folder in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(folder)) > 1:
            break
        shared += 1
    return ["/".join(path[shared:]) for path in paths]


def render_explorer(data: dict[str, Any]) -> str:
    """The page as HTML, with `data` (from `describe_exploration`) embedded."""
    template = files("dgnet.analysis").joinpath("explorer.html").read_text(encoding="utf-8")
    # Inside a script element only "<" must be escaped ("</script>", "<!--"). Escaping ">" and "&" makes it safe elsewhere too.
    document = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        document = document.replace(character, f"\\u{ord(character):04x}")
    values = {"title": html.escape(f"{data['model']}: connectivity explorer"), "data": document}
    return re.sub(r"\{\{(title|data)\}\}", lambda match: values[match[1]], template)


def write_explorer(
    network: nn.Module,
    dataset: ImageDataset,
    path: str | Path,
    *,
    images: int = 1000,
    class_names: Sequence[str] | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    model: str = "network",
    source: str = "",
) -> Path:
    """Run `network` as `collect` does, and write the explorer page; returns its path.

    `model`, `source`: the names of the network and of the data, for the heading. If `source` is a path, its last part is shown.

    Raises UsageError as `collect` does, and if the file cannot be written.
    """
    path = Path(path)
    found = collect(network, dataset, images, class_names, batch_size, workers, device)
    page = render_explorer(describe_exploration(found, model, Path(source).name))
    with writing(path, "name another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as written:
            written.write_text(page, encoding="utf-8", errors="replace")  # a file name may not be valid Unicode
    return path
