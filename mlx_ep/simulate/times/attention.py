"""Time of one layer's attention: prompt chunks and decodes in one kernel call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlx_ep.simulate.times.tables import Numbers, bracket, bracket_one

Point = tuple[float | int, ...]

# How skew_fit.csv names its buckets: upper limits and labels.
_Buckets = Sequence[tuple[float | int, str]]
_DECODES: _Buckets = (
    *((n, f"n<={n}") for n in (2, 4, 8, 16, 32, 64, 128, 256)),
    (float("inf"), "n>256"),
)
_SHARES: _Buckets = (
    (0.05, "sr<=5%"),
    (0.15, "sr<=15%"),
    (0.4, "sr<=40%"),
    (0.7, "sr<=70%"),
    (float("inf"), "sr>70%"),
)
_LONGEST: _Buckets = (
    (1024, "kvB<=1k"),
    (4096, "kvB<=4k"),
    (16384, "kvB<=16k"),
    (float("inf"), "kvB>16k"),
)
_KEYS = (512, 1024, 2048, 4096, 8192)
_BEFORE: _Buckets = (
    (0, "kp=0"),
    *((n, f"kp<={n // 1024}k" if n > 512 else "kp<=512") for n in _KEYS),
    (float("inf"), "kp>8k"),
)


class AttentionTable:
    """Measured times over (chunk, tokens before it, decodes, keys of a decode).

    Steps with a chunk run another kernel than steps of single tokens: there is no
    interpolation between no chunk and the shortest one.

    Args:
        points: ``(chunk, before, decodes, keys, us)``. Missing corners of the grid are
            filled from their neighbours.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        plain = [p for p in points if p[0] == 0]
        mixed = [p for p in points if p[0] > 0]
        self._plain = _Grid(plain) if plain else None
        self._mixed = _Grid(mixed) if mixed else None

    def __call__(
        self,
        chunk: float | int,
        before: float | int,
        decodes: float | int,
        keys: Numbers,
    ) -> np.ndarray:
        """us for each of `keys`; 0 where there is nothing to do."""
        shape = np.shape(keys)
        if chunk == 0 and decodes == 0:
            return np.zeros(shape)
        grid = self._mixed if chunk else self._plain
        if grid is None:
            raise ValueError("The bundle's attention.csv lacks such steps.")
        return grid(chunk, before, decodes, keys)


class _Grid:
    """A regular grid in four dimensions, made of a table with gaps."""

    def __init__(self, points: Sequence[Point]) -> None:
        table = np.array(points, np.float64)  # on host
        self._axes = [np.unique(table[:, i]) for i in range(4)]
        shape = [len(axis) for axis in self._axes]
        times = np.full(shape, np.nan)
        places = (np.searchsorted(x, table[:, i]) for i, x in enumerate(self._axes))
        times[tuple(places)] = table[:, 4]
        # Without decodes their keys do not matter.
        none = np.flatnonzero(self._axes[2] == 0)
        for index in none.tolist():  # on host
            times[:, :, index, :] = times[:, :, index, :1]
        # Along the keys inside a row first, then from row to row, from few decodes to
        # more, which go on as they began.
        self._fill(times, 3, beyond=False)
        self._fill(times, 1, beyond=True)
        self._fill(times, 2, beyond=True)
        self._fill(times, 0, beyond=True)
        self._times, self._least = times, float(np.nanmin(times))
        self._lists = [axis.tolist() for axis in self._axes]  # on host

    def _fill(self, times: np.ndarray, axis: int, beyond: bool) -> None:
        """Fill gaps along an axis, between known points or also outside of them."""
        lanes = np.moveaxis(times, axis, -1)
        grid = self._axes[axis]
        for place in np.ndindex(lanes.shape[:-1]):
            lane = lanes[place]
            known = ~np.isnan(lane)
            if known.all() or not known.any():
                continue
            have, times = grid[known], lane[known]
            gaps = ~known
            if not beyond:
                gaps &= (grid > have[0]) & (grid < have[-1])
            values = np.interp(grid[gaps], have, times)
            if len(have) > 1:
                rise = (times[-1] - times[-2]) / (have[-1] - have[-2])
                values += rise * np.maximum(grid[gaps] - have[-1], 0)
            lane[gaps] = values

    def __call__(
        self,
        chunk: float | int,
        before: float | int,
        decodes: float | int,
        keys: Numbers,
    ) -> np.ndarray:
        # The numbers that all steps share first: what is left is a line over keys.
        line: np.ndarray = np.zeros(len(self._axes[3]))
        sides = [
            bracket_one(axis, value)
            for axis, value in zip(self._lists, (chunk, before, decodes))
        ]
        for corner in _CORNERS:
            weight = 1.0
            for side, (_, part) in zip(corner, sides):
                weight *= part if side else 1 - part
            if weight:
                i, j, k = (low + side for side, (low, _) in zip(corner, sides))
                line = line + weight * self._times[i, j, k]
        if len(line) == 1:
            return np.full(np.shape(keys), max(line[0], self._least))
        low, upper = bracket(self._axes[3], keys)
        found = line[low] * (1 - upper) + line[low + 1] * upper
        return np.asarray(np.maximum(found, self._least))  # on host


_CORNERS = list(np.ndindex(2, 2, 2))


class Skew:
    """How much longer attention takes where some sequences are much longer.

    With t(keys) the time of equally long sequences, the time is
    t(mean) + alpha * (t(longest) - t(mean)); alpha was fitted per bucket of (chunk,
    decodes, share of long sequences, longest, tokens before the chunk).

    Args:
        alphas: by chunk and the labels of the other four.
        default: of buckets that were not measured.
    """

    def __init__(
        self,
        alphas: Mapping[tuple[float | int, str, str, str, str], float | int],
        default: float | int = 0.0,
    ) -> None:
        self._alphas, self._default = dict(alphas), default
        self._chunks = sorted({key[0] for key in alphas if key[0] > 0})

    def alpha(
        self,
        chunk: float | int,
        decodes: int,
        share: float | int,
        longest: float | int,
        before: float | int,
        has_graphs: bool,
    ) -> float:
        """Of a step; a sequence is long beyond the middle of shortest and longest.

        0 for steps of single tokens that run as a captured graph: it splits the
        keys of every sequence over the device as for the longest context possible, so
        that no long sequence is left over at the end. The profile ran without graphs.
        """
        if not self._alphas or (has_graphs and not chunk):
            return 0.0
        near = 0.0
        if chunk and self._chunks:
            near = min(self._chunks, key=lambda c: abs(np.log(c / chunk)))
        key = (
            near,
            _label(_DECODES, decodes),
            _label(_SHARES, share),
            _label(_LONGEST, longest),
            _label(_BEFORE, before),
        )
        return self._alphas.get(key, self._default)


def _label(buckets: _Buckets, value: float | int) -> str:
    return next(label for limit, label in buckets if value <= limit)


def chunk_equivalent(prefills: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """One chunk behind so many tokens that has as many scores as several chunks.

    A chunk of c tokens behind k others has c * (k + c / 2) scores.

    Returns:
        Its tokens, and the tokens before it.
    """
    if not prefills:
        return 0.0, 0.0
    tokens = sum(chunk for chunk, _ in prefills)
    scores = sum(chunk * (before + chunk / 2) for chunk, before in prefills)
    before = scores / tokens - tokens / 2
    if before >= 0:
        return float(tokens), before
    return float(np.sqrt(2 * scores)), 0.0
