"""Test cases: fewer than the product of all options in the fast set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def all_pairs(*sizes: int) -> list[tuple[int, ...]]:
    """Rows with one index for each axis. Any two indices of two different axes are together in at least one row.

    `sizes`: number of values of each axis. Greedy: the next row is the one with the most pairs that are still missing.
    """
    rows = {row: set(combinations(enumerate(row), 2)) for row in product(*map(range, sizes))}
    missing = set().union(*rows.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(rows[row] & missing))
        missing -= rows[best]
        chosen.append(best)
    return sorted(chosen)


def pairwise(is_rest_slow: bool = True, **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over `axes`: all pairs in the fast set and, with `is_rest_slow`, all other cases in the slow set."""
    sizes = [len(axis) for axis in axes.values()]
    fast = set(all_pairs(*sizes))
    cases = []
    for row in product(*map(range, sizes)):
        if row in fast or is_rest_slow:
            values = [axis[place] for axis, place in zip(axes.values(), row, strict=True)]
            name = "-".join(getattr(value, "__name__", None) or str(value) for value in values)
            cases.append(pytest.param(*values, id=name, marks=() if row in fast else pytest.mark.slow))
    return pytest.mark.parametrize(list(axes), cases)


def slow_unless(is_fast: Callable[[str], bool], names: Iterable[str]) -> list[Any]:
    """Cases of one name each; those that are not fast are in the slow set only."""
    return [pytest.param(name, marks=() if is_fast(name) else pytest.mark.slow) for name in names]


def third(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over `axes`: a third of the cases is in the fast set, the rest in the slow. Each has every value."""
    cases = []
    for row in product(*map(enumerate, axes.values())):
        name = "-".join(getattr(value, "__name__", None) or str(value) for _, value in row)
        marks = () if sum(index for index, _ in row) % 3 == 0 else pytest.mark.slow
        cases.append(pytest.param(*(value for _, value in row), id=name, marks=marks))
    return pytest.mark.parametrize(list(axes), cases)
