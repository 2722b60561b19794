"""What connectivity a network has learned (§6.5): statistics over a data set, the paper's figures, pages to explore."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgnet.analysis._adjacency import plot_adjacency as plot_adjacency
    from dgnet.analysis._adjacency import plot_graph as plot_graph
    from dgnet.analysis._analyze import analyze as analyze
    from dgnet.analysis._explorer_page import write_explorer as write_explorer
    from dgnet.analysis._sweep import sweep_thresholds as sweep_thresholds

_PLACES = {
    "analyze": "_analyze",
    "plot_adjacency": "_adjacency",
    "plot_graph": "_adjacency",
    "sweep_thresholds": "_sweep",
    "write_explorer": "_explorer_page",
}


def __getattr__(name: str) -> Any:
    """Functions are imported when they are first used: matplotlib takes a while."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"dgnet.analysis.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
