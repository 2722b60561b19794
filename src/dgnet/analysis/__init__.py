"""Analysis of a network's connectivity (§6.5): statistics over a data set, the paper's figures, and interactive pages."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.analysis._adjacency import plot_adjacency as plot_adjacency
    from dgnet.analysis._adjacency import plot_graph as plot_graph
    from dgnet.analysis._analyze import analyze as analyze
    from dgnet.analysis._explorer_page import write_explorer as write_explorer
    from dgnet.analysis._sweep import sweep_thresholds as sweep_thresholds
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
