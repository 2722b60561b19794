"""The work of `dgnet analyze`: one pass over a data set, the paper's figures and their numbers, §6.5's observations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dgnet._cost import cost_model
from dgnet.analysis._adjacency import GraphRow, draw_edges, draw_graphs
from dgnet.analysis._figures import save_figure, shorten
from dgnet.analysis._observations import Observation, judge
from dgnet.analysis._plots import Curve, draw_class_distance, draw_class_means, draw_curves, draw_points
from dgnet.analysis._statistics import ImageResult, Statistics
from dgnet.data import EvaluationLoader, ImageDataset
from dgnet.documents import read_yaml
from dgnet.errors import UsageError, check_range
from dgnet.evaluation import find_image_size, flatten_edges, run_pass
from dgnet.files import make_writable, replace_file, to_json, without_nan, write_table, writing
from dgnet.graph import find_stages, require_stages
from dgnet.options import MOST_WORKERS
from dgnet.training import read_history

SAMPLED = 2000
"""Most images in the embedding."""
MOST_IMAGES = 12
"""Most images in one figure of graphs."""


@dataclass
class Analysis:
    """The results of an analysis, and the files written."""

    statistics: Statistics
    observations: list[Observation]
    dataset: ImageDataset
    follows_image: bool  # whether any weight depends on the image; if not, weights have no spread and nothing closes
    groups: dict[str, list[ImageResult]]  # images whose graphs are drawn, by group
    embedding: tuple[Tensor, list[float]] | None  # see `embed`
    files: list[Path] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        found = self.statistics
        wirings = len(found.wiring.wirings)
        return {
            "images": found.images,
            "labelled": found.labelled,
            "top1": found.top1,
            "loss": found.loss,
            **{name: value for name, value in found.wiring.summary().items() if name != "distinct_wirings"},
            "distinct_wirings": wirings,
            "all_wirings_counted": found.wiring.wirings.total() == found.images,
            "weights_follow_image": self.follows_image,
            "dense_multiply_adds": found.costs.dense,
            "executed_multiply_adds": found.executed_mean,
            "executed_std": found.executed_std,
            "executed_least": found.executed_least,
            "executed_most": found.executed_most,
            "observations": [asdict(observation) for observation in self.observations],
            "files": [path.name for path in self.files],
        }


def analyze(network: nn.Module, dataset: ImageDataset, folder: Path, *arguments: Any, **options: Any) -> Analysis:
    """`find_analysis` with these arguments, and `save_analysis`."""
    analysis = find_analysis(network, dataset, folder, *arguments, **options)
    save_analysis(analysis, folder)
    return analysis


def find_analysis(
    network: nn.Module,
    dataset: ImageDataset,
    folder: Path,
    images: Sequence[str] = (),
    extremes: int = 3,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    seed: int = 0,
) -> Analysis:
    """Run `network` once over `dataset`, whose transform is set. Nothing is written; `folder` is where it will be.

    `images`: indices or names of images whose graphs are drawn. `extremes`: the number of easiest and of hardest images whose
    graphs are drawn too, by loss and by executed multiply-adds. `seed`: for drawing the images of the embedding, at most 2,000.
    Figures that need labels, or weights that depend on the image, are left out if there are none.

    Raises UsageError for a network without dynamic stages, an empty data set, an unknown image, and a folder that cannot be
    written.
    """
    require_stages(network)
    check_range("--batch-size", batch_size, 1)
    check_range("--workers", workers, 0, MOST_WORKERS)
    check_range("--extremes", extremes, 0, MOST_IMAGES)
    if not len(dataset):
        raise UsageError("the data set holds no images; name another with --data")
    chosen = find_images(dataset, images)
    make_writable(folder)
    statistics = gather_statistics(network, dataset, extremes, chosen, batch_size, workers, device, seed)
    groups = {
        "chosen": [image for image in statistics.chosen.values() if image is not None],
        "easiest": statistics.easiest.images,
        "hardest": statistics.hardest.images,
    }
    if statistics.executed_least < statistics.executed_most:
        groups |= {"cheapest": statistics.cheapest.images, "dearest": statistics.dearest.images}
    groups = {name: found for name, found in groups.items() if found}
    stages = find_stages(network)
    follows = any(stage.weighting.reads_features or stage.has_gates for stage in stages)
    return Analysis(statistics, judge(statistics), dataset, follows, groups, embed(statistics))


def save_analysis(analysis: Analysis, folder: Path) -> None:
    """Write figures and numbers into `folder`. Raises UsageError if they cannot be written."""
    with writing(folder):
        _save_figures(analysis, analysis.dataset, folder)
        _save_tables(analysis, analysis.dataset, folder)


def find_images(dataset: ImageDataset, images: Sequence[str]) -> list[int]:
    """The indices of images given by index or by name.

    A name is the data set's name of the image, or the part of it after a / or a space.

    Raises UsageError for an index out of range, and for a name that is unknown or matches several images.
    """
    indices = []
    for image in images:
        if image.removeprefix("-").isdecimal():
            if not 0 <= int(image) < len(dataset):
                raise UsageError(f"image {image} is out of range: the data set holds {len(dataset):,}, 0 to {len(dataset) - 1}")
            indices.append(int(image))
            continue
        endings = (f"/{image}", f" {image}")
        found = [i for i, name in enumerate(map(dataset.name, range(len(dataset)))) if name == image or name.endswith(endings)]
        if not found:
            raise UsageError(f"no image is called {image!r}; the first is {dataset.name(0)!r}, or give an index")
        if len(found) > 1:
            some = ", ".join(map(str, found[:5]))
            raise UsageError(
                f"{len(found)} images are called {image!r}, indices {some}; give one of these, or more of the path"
            )
        indices += found
    return list(dict.fromkeys(indices))


def gather_statistics(
    network: nn.Module,
    dataset: ImageDataset,
    extremes: int = 0,
    chosen: Sequence[int] = (),
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    seed: int = 0,
) -> Statistics:
    """One pass of `network` over `dataset`; see `Statistics`. The network is left on `device`, in evaluation mode."""
    loader = EvaluationLoader(dataset, batch_size, workers)
    sampled = np.random.default_rng(seed).permutation(len(dataset))[:SAMPLED].tolist()
    costs = cost_model(network, find_image_size(loader))
    statistics = Statistics(network, len(dataset.class_names), costs, extremes, chosen, sampled)
    run_pass(network, loader, [statistics], device=device, desc="analyze")
    return statistics


def _save_figures(analysis: Analysis, dataset: ImageDataset, folder: Path) -> None:
    statistics, wiring = analysis.statistics, analysis.statistics.wiring
    masks = wiring.masks
    over = f"over {statistics.images:,} images"

    def save(figure: Any, name: str) -> None:
        analysis.files += save_figure(figure, folder, name)

    save(draw_edges(wiring.mean(), masks, f"mean weight of an edge {over}"), "mean")
    if analysis.follows_image:
        save(draw_edges(wiring.std(), masks, f"standard deviation of an edge's weight {over}"), "std")
        shares = [100 * share for share in wiring.open_share()]
        save(draw_edges(shares, masks, f"images for which an edge is open, % of {statistics.images:,}", (0.0, 100.0)), "open")
    for group, images in analysis.groups.items():
        parts = [images[start : start + MOST_IMAGES] for start in range(0, len(images), MOST_IMAGES)]
        for number, part in enumerate(parts, start=1):
            rows = [GraphRow(image.adjacency, thumbnail(dataset, image.index), caption(dataset, image)) for image in part]
            name = f"graphs_{group}" if len(parts) == 1 else f"graphs_{group}_{number}"
            save(draw_graphs(rows, masks, _TITLES[group]), name)
    classes = statistics.classes
    if analysis.follows_image and len(classes) > 1 and statistics.free.any():
        names = [dataset.class_names[label] for label in classes]
        free = statistics.free
        difference = (statistics.class_mean() - statistics.mean())[:, free]
        edges = [edge for edge in statistics.edges if edge.is_free]
        save(draw_class_means(difference, names, edges, [len(mask) for mask in masks]), "class_means")
        save(draw_class_distance(statistics.class_distance(), names), "class_distance")
    if analysis.embedding is not None:
        sample = statistics.sample
        varies = statistics.executed_least < statistics.executed_most
        values = sample.executed / 1e6 if varies else sample.confidences
        label = "executed multiply-adds, M; darker is more" if varies else "probability of the prediction; darker is more"
        save(draw_points(*analysis.embedding, sample.labels, dataset.class_names, values, label), "embedding")


_TITLES = {
    "chosen": "chosen images",
    "easiest": "the smallest loss first",
    "hardest": "the largest loss first",
    "cheapest": "the fewest executed multiply-adds first",
    "dearest": "the most executed multiply-adds first",
}


def thumbnail(dataset: ImageDataset, index: int, side: int = 160) -> Any:
    """An image as stored, without the transform, with sides of at most `side` pixels."""
    picture, _ = dataset.load(index)
    picture = picture.copy()
    picture.thumbnail((side, side))
    return picture


def caption(dataset: ImageDataset, image: ImageResult) -> str:
    """An image's index and file, class, prediction, loss and cost, one line each."""
    names = dataset.class_names
    file = dataset.name(image.index).rpartition("/")[2].rpartition(", ")[2]  # in a shard's name, the key follows a comma
    lines = [f"{image.index}: {shorten(file, 22)}"]
    if image.label is not None:
        lines.append(f"class {shorten(names[image.label], 20)}")
    lines.append(f"predicted {shorten(class_name(names, image.prediction), 14)}, {100 * image.confidence:.1f} %")
    if image.loss is not None:
        lines.append(f"loss {image.loss:.3g}")
    return "\n".join([*lines, f"{image.executed / 1e6:.2f} M multiply-adds"])


def class_name(names: Sequence[str], label: int) -> str:
    """A class's name, or its number if the data set has no name for it."""
    return names[label] if label < len(names) else str(label)


def embed(statistics: Statistics) -> tuple[Tensor, list[float]] | None:
    """The first two principal components of the sampled images' weights, (S, 2), and the share of the variance along each.

    Only free edges count. None if the weights do not vary.
    """
    from sklearn.decomposition import PCA

    weights = statistics.sample.weights[:, statistics.free].double().numpy()
    if min(weights.shape) < 2 or weights.std(0).max(initial=0) < 1e-7:
        return None
    components = PCA(2, svd_solver="full").fit(weights)
    return torch.from_numpy(components.transform(weights)), components.explained_variance_ratio_.tolist()


def _save_tables(analysis: Analysis, dataset: ImageDataset, folder: Path) -> None:
    """Write edges.csv, images.csv, class_means.csv, class_distance.csv and embedding.csv."""
    statistics = analysis.statistics
    names = dataset.class_names

    def save(name: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            write_table(folder / name, rows)
            analysis.files.append(folder / name)

    keys = [asdict(edge) for edge in statistics.edges]
    columns = zip(statistics.mean().tolist(), statistics.std().tolist(), statistics.open_share().tolist(), strict=True)
    figures = [{"mean": mean, "std": std, "open_share": share} for mean, std, share in columns]
    save("edges.csv", [key | figure for key, figure in zip(keys, figures, strict=True)])
    save(
        "images.csv",
        [
            {
                "group": group,
                "index": image.index,
                "name": dataset.name(image.index),
                "class": "" if image.label is None else names[image.label],
                "prediction": class_name(names, image.prediction),
                "confidence": image.confidence,
                "loss": image.loss,
                "executed_multiply_adds": image.executed,
                "open_edges": int((flatten_edges(image.adjacency, statistics.topologies) != 0).sum()),
            }
            for group, images in analysis.groups.items()
            for image in images
        ],
    )
    if not analysis.follows_image:
        return
    labels = statistics.classes
    class_rows = zip(labels, statistics.class_mean().tolist(), strict=True)
    save(
        "class_means.csv",
        [
            {"class": names[label], "images": int(statistics.class_images[label]), **key, "mean": mean}
            for label, means in class_rows
            for key, mean in zip(keys, means, strict=True)
        ],
    )
    if len(labels) > 1:
        distances = statistics.class_distance().tolist()
        save(
            "class_distance.csv",
            [
                {"class": names[label], "other": names[other], "distance": distance}
                for label, row in zip(labels, distances, strict=True)
                for other, distance in zip(labels, row, strict=True)
            ],
        )
    if analysis.embedding is not None:
        sample = statistics.sample
        figures_of = zip(sample.indices.tolist(), sample.labels.tolist(), analysis.embedding[0].tolist(), strict=True)
        rows = [
            {"index": index, "class": "" if label < 0 else names[label], "first": first, "second": second}
            for index, label, (first, second) in figures_of
        ]
        save("embedding.csv", rows)


def read_curves(runs: Sequence[str]) -> list[Curve]:
    """The curves of run folders. Raises UsageError for one without metrics."""
    names = name_runs([Path(run) for run in runs])
    return [read_curve(Path(run), name) for run, name in zip(runs, names, strict=True)]


def save_curves(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Write `curves.png`, `.svg` and `.csv` (Fig. 4); returns their paths. Raises UsageError if they cannot be written."""
    rows = [
        {
            "run": curve.name,
            "epoch": epoch,
            "train_loss": loss,
            "top1": dict(zip(curve.evaluated, curve.top1, strict=True)).get(epoch),
        }
        for curve in curves
        for epoch, loss in zip(curve.epochs, curve.train_loss, strict=True)
    ]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        paths = save_figure(draw_curves(curves), folder, "curves")
        write_table(folder / "curves.csv", rows)
    return [*paths, folder / "curves.csv"]


def read_curve(run: Path, name: str) -> Curve:
    """Read a run's metrics.csv. Raises UsageError if it is missing or not such a table."""
    rows = read_history(run)
    epochs = [int(row["epoch"]) + 1 for row in rows]
    losses = [row.get("train_loss", math.nan) for row in rows]
    evaluated = [(int(row["epoch"]) + 1, row["val_top1"]) for row in rows if "val_top1" in row]
    if not rows:
        raise UsageError(
            f"{run} is not a run folder, or its metrics.csv holds no epoch; --curves takes run folders of dgnet train"
        )
    return Curve(name, epochs, losses, [epoch for epoch, _ in evaluated], [top1 for _, top1 in evaluated])


def name_runs(runs: Sequence[Path]) -> list[str]:
    """A name for each run: the options (at most three) in which the runs' config.yaml differ; otherwise the folders' names."""
    folders = [run.resolve().name for run in runs]
    configs, kwargs = [], []
    for run in runs:
        try:
            config = dict(read_yaml(run / "config.yaml"))
            kwargs.append(dict(config.pop("model_kwargs", None) or {}))
        except (UsageError, ValueError, TypeError):
            return folders
        configs.append({name: value for name, value in config.items() if name not in _NO_CHOICE})
    both = [{**config, **more} for config, more in zip(configs, kwargs, strict=True)]
    for options in (configs, both):  # first without the model's options, which often follow from the others
        known = dict.fromkeys(name for values in options for name in values)
        differing = [name for name in known if len({str(values.get(name)) for values in options}) > 1]
        names = [", ".join(f"{name} {values.get(name)}" for name in differing) for values in options]
        if 0 < len(differing) <= 3 and len(set(names)) == len(names):
            return names
    return folders


_NO_CHOICE = ("output", "data_root", "workers", "threads", "devices", "accelerator")
"""Options that are not used to name runs."""


def save_document(document: dict[str, Any], folder: Path) -> Path:
    """Write `analysis.json`. Raises UsageError if it cannot be written."""
    path = folder / "analysis.json"
    with writing(folder), replace_file(path) as written:
        written.write_text(to_json(without_nan(document), indent=1) + "\n", encoding="utf-8")
    return path
