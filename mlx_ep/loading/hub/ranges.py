"""Byte ranges of a file: which are wanted, which are there, what to ask for. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

# Bytes that nobody asked for, fetched because a request more would cost more time.
_MOST_WASTE = 0.01
_LARGEST_GAP = 1 << 20


class Span(NamedTuple):
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class RangeSet:
    """A set of bytes, kept as spans in order that neither touch nor overlap."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for span in spans:
            self.add(span)

    def add(self, span: Span) -> None:
        """Unite with `span`; an empty one changes nothing."""
        if span.num_bytes <= 0:
            return
        # Those from first up to last touch or overlap the span.
        first = bisect_left(self._stops, span.start)
        last = bisect_right(self._starts, span.stop)
        start = min([span.start, *self._starts[first:last][:1]])
        stop = max([span.stop, *self._stops[first:last][-1:]])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def missing(self, span: Span) -> list[Span]:
        """The parts of `span` that are not in the set, in order."""
        found, position = [], span.start
        for index in range(bisect_right(self._stops, span.start), len(self._starts)):
            start, stop = self._starts[index], self._stops[index]
            if start >= span.stop:
                break
            if start > position:
                found.append(Span(position, start))
            position = stop
        if position < span.stop:
            found.append(Span(position, span.stop))
        return found

    @property
    def num_bytes(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def __iter__(self) -> Iterator[Span]:
        return map(Span, self._starts, self._stops)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and list(self) == list(other)


def bridge_gaps(
    spans: RangeSet, most_waste: float = _MOST_WASTE, largest_gap: int = _LARGEST_GAP
) -> RangeSet:
    """`spans` with the smallest gaps between them filled, for fewer requests.

    Args:
        most_waste: bytes of gaps per byte of spans; 0.01 adds at most 1 %.
        largest_gap: gaps of more bytes than this stay.
    """
    budget = int(spans.num_bytes * most_waste)
    gaps = [Span(a.stop, b.start) for a, b in pairwise(spans)]
    bridged = RangeSet(spans)
    for gap in sorted(gaps, key=lambda gap: (gap.num_bytes, gap.start)):
        if gap.num_bytes > min(budget, largest_gap):
            break
        bridged.add(gap)
        budget -= gap.num_bytes
    return bridged


def pieces(span: Span, size: int) -> list[Span]:
    """`span` cut into consecutive parts of `size` bytes; the last may have fewer.

    (0, 10) by 4: (0, 4) (4, 8) (8, 10).
    """
    return [
        Span(start, min(start + size, span.stop))
        for start in range(span.start, span.stop, size)
    ]
