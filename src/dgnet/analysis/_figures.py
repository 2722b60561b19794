"""What all pictures share: colours, text, and how they are saved.

Colours are told apart by all kinds of colour vision, and darker means more in print.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from dgnet.files import replace_file

WEIGHTS, SIGNED, VALUES = "viridis_r", "PuOr_r", "cividis_r"
# Okabe and Ito's colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH = 7.0  # inches, two columns of a paper
ABOVE: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}


class ShownFigure(Figure):
    """A figure that a notebook shows where it is the last value of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=120)
        return content.getvalue()


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or as it was; the SVG's text stays text."""
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": "dgnet", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # file names may hold what no font here has
        figure.set_dpi(200)  # text is a little wider at some resolutions than at others
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: it is slow, and a second time would move things a little
        for ending in ("png", "svg"):
            path = folder / f"{name}.{ending}"
            with replace_file(path) as written:
                figure.savefig(written, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
            paths.append(path)
    return paths


def scale(values: Tensor, limits: tuple[float, float] | None) -> Normalize:
    """Colours from the least to the largest value; from 0 where they are all the same."""
    if limits is not None:
        return Normalize(*limits)
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    return Normalize(low, high) if high - low > 1e-9 else Normalize(min(0.0, high), max(0.0, high) or 1.0)


def write_cell(axes: Axes, row: int, column: int, text: str, norm: Normalize, size: float) -> None:
    """A number on its colour."""
    colour = "white" if norm(float(text)) > 0.5 else "black"
    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def add_colour_bar(figure: Figure, norm: Normalize, colours: str, label: str) -> None:
    """One for all panels, below them."""
    place: dict[str, Any] = {"location": "bottom", "fraction": 0.06, "aspect": 40, "shrink": 0.6, "panchor": False}
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=figure.axes, **place)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def shorten(text: str, length: int) -> str:
    """`text`, with … where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plain(text: str) -> str:
    """`text` as it is drawn as it stands: matplotlib would set what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")


def shrink_text(axes: Axes, size: float) -> None:
    """Ticks in `size` points, title and labels in 8."""
    axes.tick_params(labelsize=size)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(8)
