"""What a rank did and holds."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import mlx.core as mx

from mlx_ep.types import to_host

Evaluated = TypeVar("Evaluated")

# The stages of a MoE layer; `wait` is until the slowest rank is there too.
STAGES = ("route", "assign", "dispatch", "experts", "combine", "wait")
# Those in which a rank sends, receives or waits for others.
COMMUNICATION_STAGES = ("dispatch", "combine", "wait")


# Calls whose pairs are kept uncounted. When there are more, the older half is counted:
# what decoding did so many calls ago has been computed long since.
MOST_UNCOUNTED = 1024


@dataclass
class Counters:
    """What this rank did since the last `reset`.

    Attributes:
        layer_calls: MoE layers entered.
        pairs_routed: (row, expert) choices that this rank looked at; with the strategy
            `replicated` all that the router made.
        collectives: collectives that the model's layers started: MoE layers, and what
            `--attention tensor` splits.
        collective_bytes: bytes of their payload on this rank.
    """

    layer_calls: int = 0
    pairs_routed: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    _counted_pairs: int = field(default=0, repr=False)
    _uncounted: list[mx.array] = field(default_factory=list, repr=False)

    @property
    def pairs_computed(self) -> int:
        """(row, slot) pairs that this rank computed. May wait for the device."""
        self._count(len(self._uncounted))
        return self._counted_pairs

    def count_collective(self, num_bytes: int) -> None:
        self.collectives += 1
        self.collective_bytes += num_bytes

    def count_pairs(self, slot_ids: mx.array, num_pairs: int | None = None) -> None:
        """Count one layer's pairs.

        Args:
            slot_ids: ``[M, K]`` slots of this rank that rows visit; -1 elsewhere.
            num_pairs: how many are this rank's, where the host knows it. Else the ids
                are kept, and counted when somebody asks: nothing waits for the device.
        """
        self.layer_calls += 1
        self.pairs_routed += slot_ids.size
        if num_pairs is not None:
            self._counted_pairs += num_pairs
            return
        self._uncounted.append(slot_ids)
        if len(self._uncounted) > MOST_UNCOUNTED:
            self._count(MOST_UNCOUNTED // 2)

    def _count(self, num_calls: int) -> None:
        """Count the pairs of the oldest calls."""
        for slot_ids in self._uncounted[:num_calls]:
            # sync: only where somebody asks; older calls have been computed.
            self._counted_pairs += int((to_host(slot_ids) >= 0).sum())
        del self._uncounted[:num_calls]

    def reset(self) -> None:
        fresh = Counters()
        for counter in fields(self):
            setattr(self, counter.name, getattr(fresh, counter.name))


@dataclass
class StageTimings:
    """Seconds that the MoE layers of this rank spent in each stage.

    Off, it does nothing. On, every stage is evaluated where it ends (MLX is lazy: only
    then has it happened), and before the ranks exchange anything there is a barrier, so
    that time spent on waiting for a slower rank is not taken for time of the exchange.
    What is computed does not change; that nothing overlaps any more costs time.

    Attributes:
        enabled: whether stages are timed; the same on every rank, or they deadlock.
        seconds: by stage (`STAGES`), since the last `reset`.
        layer_calls: layers that were timed.
    """

    enabled: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: _no_seconds())
    layer_calls: int = 0
    _last: float | None = field(default=None, repr=False)

    @contextmanager
    def measure(self) -> Iterator[StageTimings]:
        """Time the layers that are called inside, from zero. On every rank alike."""
        before, self.enabled = self.enabled, True
        self.reset()
        try:
            yield self
        finally:
            self.enabled, self._last = before, None

    def reset(self) -> None:
        self.seconds = _no_seconds()
        self.layer_calls, self._last = 0, None

    def start(self) -> None:
        """The layer begins here and not where its router is done: optional."""
        if self.enabled:
            self._last = time.perf_counter()

    def begin(self, x: mx.array) -> None:
        """A layer has its tokens; what they are computed from is not the layer's."""
        if not self.enabled:
            return
        self.layer_calls += 1
        if self._last is None:
            # sync: stages are being timed.
            mx.eval(x)
            self._last = time.perf_counter()

    def run(
        self,
        stage: str,
        function: Callable[..., Evaluated],
        *args: object,
        barrier: Callable[[], None] | None = None,
    ) -> Evaluated:
        """``function(*args)``, as a stage of a layer that has begun.

        Timed, its arguments are evaluated at the cost of the stage, and what it
        returns is.

        Args:
            barrier: waits for the other ranks; given where they exchange something.
        """
        if not self.enabled:
            return function(*args)
        # sync: stages are being timed.
        mx.eval(_arrays(args))
        self._add(stage)
        if barrier is not None:
            barrier()
            self._add("wait")
        result = function(*args)
        # sync: stages are being timed.
        mx.eval(_arrays(result))
        self._add(stage)
        return result

    def end(self) -> None:
        """The layer is done; the next one begins where it begins."""
        self._last = None

    def _add(self, stage: str) -> None:
        now = time.perf_counter()
        # A stage outside of a layer has no beginning.
        self.seconds[stage] += now - (now if self._last is None else self._last)
        self._last = now


def _no_seconds() -> dict[str, float]:
    return dict.fromkeys(STAGES, 0.0)


def _arrays(value: Any) -> list[mx.array]:
    """The arrays inside tuples and records, such as the exchange of a strategy."""
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, (tuple, list)):
        if value and isinstance(value[0], int):  # not one by one: a stage is timed
            return []
        return [array for item in value for array in _arrays(item)]
    if is_dataclass(value):
        return [a for f in fields(value) for a in _arrays(getattr(value, f.name))]
    return []


@dataclass
class Exposure:
    """What of the exchanges of MoE layers is not hidden behind other computing.

    A layer's exchange is timed `alone` in some steps, and in others, beside what hides
    it, how much longer it takes than that: what is `exposed`.

    Attributes:
        times: kind -> T of this rank -> [seconds, how often].
        layers: (T, kind) adds up to a layer at a time; exchanges of several operations
            are added up.
    """

    times: dict[str, dict[int, list[float]]] = field(
        default_factory=lambda: {"alone": {}, "exposed": {}}
    )

    def add(self, kind: str, tokens: int, seconds: float, layers: int = 0) -> None:
        """Some seconds, of so many layers more."""
        total = self.times[kind].setdefault(tokens, [0.0, 0.0])
        total[0] += seconds
        total[1] += layers

    def wait(self, kind: str, tokens: int, *arrays: mx.array, layers: int = 1) -> None:
        """Add the time until arrays are there."""
        start = time.perf_counter()
        # sync: what a layer waits for is being measured.
        mx.eval(*arrays)
        self.add(kind, tokens, time.perf_counter() - start, layers)

    def per_layer(self) -> list[tuple[int, float, float]]:
        """(T, ms alone, ms exposed) of a layer, for every T that has both."""
        found = []
        for tokens in sorted(self.times["alone"]):
            alone, exposed = (
                self.times[kind].get(tokens, (0.0, 0.0)) for kind in self.times
            )
            if alone[1] and exposed[1]:
                each = (1e3 * alone[0] / alone[1], 1e3 * exposed[0] / exposed[1])
                found.append((tokens, *each))
        return found


def exposure_table(
    ranks: Sequence[Sequence[tuple[int, float, float]]],
) -> str:
    """Milliseconds of exchange that are hidden per layer, as a Markdown table; "": no T
    was timed both ways.

    Args:
        ranks: `Exposure.per_layer` of every rank, in rank order.
    """
    rows = [
        (f"rank {rank}, T={tokens}", f"{alone:.3f}", f"{exposed:.3f}",
         f"{max(alone - exposed, 0.0):.3f}")
        for rank, found in enumerate(ranks)
        for tokens, alone, exposed in found
    ]  # fmt: skip
    headers = ("ms per layer", "exchange", "exposed", "hidden")
    return markdown_table(headers, rows) if rows else ""


def stage_table(ranks: Sequence[Mapping[str, float]], layer_calls: int) -> str:
    """Microseconds per layer of each stage, one column a rank, as a Markdown table.

    Args:
        ranks: the `seconds` of every rank's `StageTimings`, in rank order.
        layer_calls: layers that each of them timed.
    """
    totals = [sum(seconds.values()) for seconds in ranks]
    names = [f"rank {rank}" for rank in range(len(ranks))]
    lines = [
        f"| us per layer, {layer_calls} layers timed | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(ranks)}",
    ]
    for stage in (*STAGES, "all"):
        cells = [
            _stage_cell(total if stage == "all" else seconds[stage], total, layer_calls)
            for seconds, total in zip(ranks, totals, strict=True)
        ]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _stage_cell(seconds: float, total: float, layer_calls: int) -> str:
    share = seconds / total if total else 0.0
    return f"{seconds / max(layer_calls, 1) * 1e6:.0f} ({share:.0%})"


@dataclass(frozen=True)
class RankReport:
    """What one rank holds and what it took to get it.

    Attributes:
        experts: the rank's experts, for a person.
        held_bytes: bytes of its parameters.
        read_bytes: bytes read from the checkpoint.
        peak_resident_bytes: the process's highest resident memory so far.
        seconds: from the first byte read to the last parameter evaluated.
    """

    rank: int
    experts: str
    held_bytes: int
    read_bytes: int
    peak_resident_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: {self.experts}, {format_bytes(self.held_bytes)} held, "
            f"{format_bytes(self.read_bytes)} read, peak "
            f"{format_bytes(self.peak_resident_bytes)} resident, {self.seconds:.1f} s"
        )


def peak_resident_bytes() -> int:
    """The highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB here


def format_bytes(num_bytes: int) -> str:
    """Bytes for a person: GB (10^9), below that MB (10^6)."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.2f} MB"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns, two spaces apart; numbers to the right.

    Args:
        left: columns that are words.
    """
    return "\n".join("  ".join(cells).rstrip() for cells in _padded(rows, left))


def markdown_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1
) -> str:
    """A Markdown table with aligned columns.

    Args:
        left: the first so many columns are words, the others numbers.
    """
    head, *body = _padded(
        [headers, *([str(cell) for cell in row] for row in rows)], range(left)
    )
    widths = [len(cell) for cell in head]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _padded(rows: Sequence[Sequence[str]], left: Sequence[int]) -> Iterator[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        yield [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in cells]
