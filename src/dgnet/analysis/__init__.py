"""Analysis of a network's connectivity (§6.5): statistics over a data set, the paper's figures, and interactive pages."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.analysis._adjacency import plot_adjacency as plot_adjacency
    from dgnet.analysis._adjacency import plot_graph as plot_graph
    from dgnet.analysis._analyze import analyze as analyze
    from dgnet.analysis._analyze import find_analysis as find_analysis
    from dgnet.analysis._analyze import read_curves as read_curves
    from dgnet.analysis._analyze import save_analysis as save_analysis
    from dgnet.analysis._analyze import save_curves as save_curves
    from dgnet.analysis._analyze import save_document as save_document
    from dgnet.analysis._explorer_guard import is_loopback as is_loopback
    from dgnet.analysis._explorer_page import write_explorer as write_explorer
    from dgnet.analysis._explorer_server import build_app as build_app
    from dgnet.analysis._explorer_server import check_address as check_address
    from dgnet.analysis._explorer_server import import_gradio as import_gradio
    from dgnet.analysis._explorer_server import own_uploads as own_uploads
    from dgnet.analysis._explorer_server import serve as serve
    from dgnet.analysis._figures import COLOURS as COLOURS
    from dgnet.analysis._figures import FORMATS as FORMATS
    from dgnet.analysis._figures import ShownFigure as ShownFigure
    from dgnet.analysis._figures import escape_text as escape_text
    from dgnet.analysis._figures import save_figure as save_figure
    from dgnet.analysis._seeds import SeedMeans as SeedMeans
    from dgnet.analysis._seeds import check_seeds as check_seeds
    from dgnet.analysis._sweep import OFFSETS as OFFSETS
    from dgnet.analysis._sweep import format_sweep as format_sweep
    from dgnet.analysis._sweep import save_sweep as save_sweep
    from dgnet.analysis._sweep import sweep_thresholds as sweep_thresholds
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
