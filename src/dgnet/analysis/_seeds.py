"""Means over runs of one network with different seeds: of every edge's statistics, and of the figures of each run.

Letters: R runs, N nodes of a stage, E edges of all stages.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.analysis._adjacency import draw_edges
from dgnet.analysis._analyze import Analysis
from dgnet.analysis._figures import save_figure
from dgnet.errors import UsageError
from dgnet.files import write_table, writing
from dgnet.graph import find_stages


def check_seeds(networks: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Raises UsageError, with the runs' `names`, if their networks have other edges, or if one run is there twice."""
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name} is given twice; means are over different runs")
    first, *others = ([stage.topology.mask for stage in find_stages(network)] for network in networks)
    for name, masks in zip(names[1:], others, strict=True):
        if len(masks) != len(first) or not all(map(torch.equal, masks, first)):
            raise UsageError(f"{name} has other edges than {names[0]}; means are over runs of one network")


@dataclass(frozen=True)
class SeedMeans:
    """The analyses of several runs on the same images. Their networks have the same edges; see `check_seeds`."""

    runs: Sequence[Analysis]

    def document(self) -> dict[str, Any]:
        """The mean and the standard deviation over runs of each figure that is a number."""
        documents = [run.document() for run in self.runs]
        figures = {}
        for name, value in documents[0].items():
            values = [document[name] for document in documents]
            if isinstance(value, int | float) and not isinstance(value, bool) and None not in values:
                figures[name] = {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
        return {"runs": len(self.runs), "figures": figures}

    def save(self, folder: Path) -> list[Path]:
        """Write edges.csv and the figures `mean` and `seed_std`; returns the paths. Raises UsageError if that fails."""
        found = [run.statistics for run in self.runs]
        columns = {"mean": [one.mean() for one in found], "std": [one.std() for one in found]}
        columns["open_share"] = [one.open_share() for one in found]
        figures: dict[str, list[float]] = {}
        for name, values in columns.items():  # for each run, (E,)
            mean, std = _over_runs(values)
            figures |= {name: mean.tolist(), f"{name}_seed_std": std.tolist()}
        rows = [
            {**asdict(edge), **{name: values[place] for name, values in figures.items()}}
            for place, edge in enumerate(found[0].edges)
        ]
        stages = [_over_runs(stage) for stage in zip(*(one.wiring.mean() for one in found), strict=True)]
        masks, over = found[0].wiring.masks, f"over {found[0].images:,} images"
        with writing(folder):
            mean_title = f"mean weight of an edge {over}, mean of {len(found)} runs"
            paths = save_figure(draw_edges([mean for mean, _ in stages], masks, mean_title), folder, "mean")
            std_title = f"standard deviation over {len(found)} runs of an edge's mean weight"
            paths += save_figure(draw_edges([std for _, std in stages], masks, std_title), folder, "seed_std")
            write_table(folder / "edges.csv", rows)
        return [*paths, folder / "edges.csv"]


def _over_runs(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (of a sample) over R tensors of one shape."""
    stacked = torch.stack(list(values))
    return stacked.mean(0), stacked.std(0)
