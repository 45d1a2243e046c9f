"""Linear interpolation in measured tables. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

Numbers = np.ndarray | float | int


def bracket(grid: np.ndarray, values: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """The grid interval of each value, and how far in it the value is.

    Below the grid the first point holds; above it the last interval goes on.

    Returns:
        ``[...]`` indices of the lower point, ``[...]`` weights of the upper one.
    """
    values = np.asarray(values, np.float64)  # on host
    if len(grid) == 1:
        return np.zeros(values.shape, np.int64), np.zeros(values.shape)
    low = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 2)
    weight = (values - grid[low]) / (grid[low + 1] - grid[low])
    return np.asarray(low), np.asarray(np.clip(weight, 0.0, None))  # on host


def bracket_one(grid: Sequence[float | int], value: float | int) -> tuple[int, float]:
    """`bracket` of one number, without arrays."""
    if len(grid) == 1:
        return 0, 0.0
    low = min(max(bisect_right(grid, value) - 1, 0), len(grid) - 2)
    return low, max((value - grid[low]) / (grid[low + 1] - grid[low]), 0.0)


class Line:
    """Time over one number.

    Args:
        points: ``(number, time)``, in any order; of equal numbers the mean counts.
    """

    def __init__(self, points: Sequence[tuple[float | int, float | int]]) -> None:
        table = np.array(points, np.float64).reshape(-1, 2)  # on host
        self.grid, place, counts = np.unique(
            table[:, 0], return_inverse=True, return_counts=True
        )
        self.times = np.bincount(place, weights=table[:, 1]) / counts
        self._grid = self.grid.tolist()  # on host
        self._times = self.times.tolist()  # on host
        # Noise may fall at the end of a table, and would fall on beyond it.
        self._least = float(self.times.min())

    def at(self, value: float | int) -> float:
        """The time of one number."""
        low, weight = bracket_one(self._grid, value)
        if not weight:
            return float(self._times[low])
        found = self._times[low] * (1 - weight) + self._times[low + 1] * weight
        return float(max(found, self._least))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, weight = bracket(self.grid, values)
        if len(self.grid) == 1:
            return self.times[low]
        found = self.times[low] * (1 - weight) + self.times[low + 1] * weight
        return np.asarray(np.maximum(found, self._least))  # on host


def sum_of_lines(lines: Sequence[tuple[float, Line]]) -> Line:
    """The line that is a weighted sum of others: exact, on all their points."""
    grid = sorted({float(x) for _, line in lines for x in line.grid})
    return Line([(x, sum(w * line.at(x) for w, line in lines)) for x in grid])


class Surface:
    """Time over tokens and experts, from a table that has no corner of few tokens with
    many experts.

    Args:
        points: ``(tokens, experts, time)``.
    """

    def __init__(self, points: Sequence[Sequence[float | int]]) -> None:
        rows: dict[float | int, list[tuple[float | int, float | int]]] = {}
        for tokens, experts, time in points:
            rows.setdefault(tokens, []).append((experts, time))
        self.tokens = np.array(sorted(rows))  # on host
        columns = sorted({experts for _, experts, _ in points})
        self.experts = np.array(columns)  # on host
        self.times = np.stack([self._row(rows[t]) for t in self.tokens])

    def _row(self, points: list[tuple[float | int, float | int]]) -> np.ndarray:
        if len(points) == 1:  # weights are what is read: as many more, as many times
            experts, time = points[0]
            return time * np.maximum(self.experts / experts, 1.0)
        return Line(points)(self.experts)

    def __call__(self, tokens: Numbers, experts: Numbers) -> np.ndarray:
        """Below the fewest experts measured, in proportion to them."""
        experts = np.asarray(experts, np.float64)  # on host
        least = self.experts[0]
        low, weight = bracket(self.tokens, tokens)
        below = self._at(low, np.maximum(experts, least))
        if len(self.tokens) > 1:
            above = self._at(low + 1, np.maximum(experts, least))
            below = below * (1 - weight) + above * weight
        found = np.maximum(below, self.times.min())
        return found * np.minimum(experts / least, 1.0)

    def _at(self, row: np.ndarray, experts: np.ndarray) -> np.ndarray:
        low, weight = bracket(self.experts, experts)
        if len(self.experts) == 1:
            return self.times[row, low]
        return self.times[row, low] * (1 - weight) + self.times[row, low + 1] * weight
