"""What all figures share: colours, text, and how they are saved.

The colours can be distinguished with every kind of colour vision. In a printed figure, darker means more.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from dgnet._streams import escape
from dgnet.files import replace_content

WEIGHTS, SIGNED, VALUES = "viridis_r", "PuOr_r", "cividis_r"
# The palette of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH = 7.0  # inches, two columns of a paper
ABOVE: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}


class ShownFigure(Figure):
    """A figure that a notebook displays without pyplot if it is the last value of a cell."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=120)
        return content.getvalue()


FORMATS = ("png", "svg", "pdf")
"""The formats of figures, as their files end."""
_DATED = {"svg": "Date", "pdf": "CreationDate"}
"""Entries that would make two files of one figure differ."""


def save_figure(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS[:2]) -> list[Path]:
    """Write a figure in each of `formats`, by default PNG and SVG; returns the paths.

    An existing file is replaced only when the new one is complete. Text in the SVG and the PDF stays text.
    """
    paths = []
    settings: Any = {"svg.hashsalt": "dgnet", "svg.fonttype": "none", "pdf.fonttype": 42}  # 42: fonts as journals ask for them
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # file names may hold characters that no font has
        figure.set_dpi(200)  # lay out at the resolution of the PNG: the width of text depends on it
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # lay out only once: it is slow, and the second result would differ slightly
        for ending in formats:
            path = folder / f"{name}.{ending}"
            content = io.BytesIO()  # first in memory: Pillow does not say why a file cannot be written
            figure.savefig(content, format=ending, dpi=200, metadata={_DATED[ending]: None} if ending in _DATED else None)
            with replace_content(path) as file:
                file.write(content.getvalue())  # a view could outlive the buffer after an error
            paths.append(path)
    return paths


def scale(values: Tensor, limits: tuple[float, float] | None) -> Normalize:
    """A colour scale from the smallest to the largest value; if all values are equal, from 0 to that value."""
    if limits is not None:
        return Normalize(*limits)
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    return Normalize(low, high) if high - low > 1e-9 else Normalize(min(0.0, high), max(0.0, high) or 1.0)


@dataclass(frozen=True)
class WeightColours:
    """The colours of edge weights: one hue from the least to the greatest, or two hues around 0 if weights have both signs."""

    norm: Normalize
    name: str  # of the colour map
    meaning: str  # what a reader sees

    @classmethod
    def of(cls, values: Tensor, limits: tuple[float, float] | None = None) -> WeightColours:
        """The colours for `values`, within `limits` if these are given. A weight hardly below 0 has no hue of its own."""
        largest = float(values.abs().max()) if len(values) else 0.0
        if limits is None and len(values) and float(values.min()) < -0.1 * largest:
            return cls(Normalize(-largest, largest), SIGNED, "orange is positive, purple negative")
        return cls(scale(values, limits), WEIGHTS, "darker is more")

    def __call__(self, weight: float) -> Any:
        """The colour of a weight."""
        return matplotlib.colormaps[self.name](self.norm(weight))

    def line(self, weight: float) -> Any:
        """The colour of a line for a weight. Around 0 the two hues would be white."""
        if self.name != SIGNED:
            return self(weight)
        place = float(self.norm(weight))
        return matplotlib.colormaps[SIGNED](0.5 + 0.55 * (place - 0.5) + math.copysign(0.225, weight))


def write_cell(axes: Axes, row: int, column: int, text: str, ground: tuple[float, ...], size: float) -> None:
    """Write a number into a cell, white on a dark colour and black on a light one. `ground`: the cell's red, green, blue."""
    red, green, blue = ground[:3]
    colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"  # as bright as eyes see it
    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def add_colour_bar(figure: Figure, norm: Normalize, colours: str, label: str) -> None:
    """Add one colour bar for all panels, below them."""
    place: dict[str, Any] = {"location": "bottom", "fraction": 0.06, "aspect": 40, "shrink": 0.6, "panchor": False}
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=figure.axes, **place)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def shorten(text: str, length: int) -> str:
    """`text`, cut to `length` characters with … at its end if it is longer."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def escape_text(text: str) -> str:
    """`text` as matplotlib draws it: between dollar signs it would draw a formula; it refuses names that are not UTF-8."""
    return escape(text).replace("$", r"\$")


def shrink_text(axes: Axes, size: float) -> None:
    """Set tick labels to `size` points, title and axis labels to 8."""
    axes.tick_params(labelsize=size)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(8)
