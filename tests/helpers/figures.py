"""The contents of figures, for tests."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch


def panels(figure: Figure) -> list[Axes]:
    """The axes of stages."""
    return [axes for axes in figure.axes if "stage " in axes.get_title() + axes.get_label()]


def arrows(axes: Axes) -> list[FancyArrowPatch]:
    """The edges of a stage."""
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


def words(figure: Figure) -> str:
    """All texts of a figure, one per line."""
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return "\n".join(texts)
