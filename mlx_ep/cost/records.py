"""The forms of the measured parts of a profile: matrices and links. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from mlx_ep.comm import CAPABILITIES, choose_schedule
from mlx_ep.comm.schedules import Round

Topology = Literal["mesh", "ring"]
Number = float | int


def quantity(unit: str, text: str, default: float | None = None) -> Any:
    """A field of a record of numbers, with its unit and what it is."""
    metadata = {"unit": unit, "text": text}
    if default is None:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def _numbers(unit: str, text: str) -> Any:
    return field(default=(), metadata={"unit": unit, "text": text})


@dataclass(frozen=True, kw_only=True)
class MatrixCost:
    """Multiplying rows with matrices: of experts by one runner, or dense ones.

        calls * call_seconds + matrices * visit_seconds
            + (rows visiting them) * width * pair_seconds
            + weights * per_weight(rows)

    A matrix here is one expert (its projections together), or one dense matrix.
    """

    rows: tuple[Number, ...] = _numbers("rows", "rows of one matrix, ascending")
    seconds: tuple[float, ...] = _numbers("s", "per weight, with so many rows")
    call_seconds: float = quantity("s", "each call, whatever it does", 0.0)
    visit_seconds: float = quantity("s", "each matrix that is used", 0.0)
    pair_seconds: float = quantity("s", "each row of a matrix, per number of it", 0.0)

    def __post_init__(self) -> None:
        rows = list(self.rows)
        if not rows or rows != sorted(set(rows)) or rows[0] < 1:
            raise ValueError(f"rows must ascend from 1 or more; got {rows}.")
        if len(self.seconds) != len(rows):
            raise ValueError(
                f"seconds must hold one number for each of {len(rows)} rows; got "
                f"{len(self.seconds)}."
            )

    def per_weight(self, rows: np.ndarray) -> np.ndarray:
        """Seconds for one weight of a matrix that so many rows visit; 0 for none.

        Straight lines between measurements, the last one goes on; never less for more
        rows.
        """
        known = np.maximum.accumulate(np.array(self.seconds))  # on host
        found = np.interp(rows, self.rows, known)
        if len(known) > 1:
            slope = (known[-1] - known[-2]) / (self.rows[-1] - self.rows[-2])
        else:
            slope = known[-1] / self.rows[-1]
        beyond = np.maximum(np.asarray(rows) - self.rows[-1], 0)  # on host
        return np.where(np.asarray(rows) > 0, found + slope * beyond, 0.0)  # on host

    def of_experts(self, counts: np.ndarray, width: int, weights: Number) -> np.ndarray:
        """Seconds of a call on experts that `counts[..., i]` rows visit.

        Args:
            counts: rows of each expert; sums are over the last axis.
            width: D.
            weights: of one expert.
        """
        used = (counts > 0).sum(axis=-1)
        matrices = self.per_weight(counts).sum(axis=-1) * weights
        pairs = counts.sum(axis=-1) * width * self.pair_seconds
        call = np.where(used > 0, self.call_seconds, 0.0)
        return call + used * self.visit_seconds + pairs + matrices


@dataclass(frozen=True, kw_only=True)
class CollectiveTable:
    """One collective as it was measured, over a number of ranks."""

    ranks: float = quantity("ranks", "of the measurement")
    bytes: tuple[Number, ...] = _numbers("B", "that a rank hands over, ascending")
    seconds: tuple[float, ...] = _numbers("s", "of the slowest rank")

    def __post_init__(self) -> None:
        sizes = list(self.bytes)
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise ValueError(f"bytes must be two or more and ascend; got {sizes}.")
        if len(self.seconds) != len(sizes):
            raise ValueError(
                f"seconds must hold one number for each of {len(sizes)} sizes; got "
                f"{len(self.seconds)}."
            )

    def at(self, num_bytes: Number) -> float:
        """Seconds for so many bytes: straight lines between measurements."""
        found = float(np.interp(num_bytes, self.bytes, self.seconds))
        rise = self.seconds[-1] - self.seconds[-2]
        slope = max(0.0, rise / (self.bytes[-1] - self.bytes[-2]))
        return found + slope * max(0.0, num_bytes - self.bytes[-1])


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects the ranks.

    Attributes:
        transport: its name in `mlx_ep.comm.CAPABILITIES`.
        topology: ``mesh``: a cable between any two ranks; ``ring``: one to each of
            two neighbours.
        tables: measured collectives, by their name in `Comm`. What has none, or was
            measured with another number of ranks, follows from latency and bandwidth.
    """

    transport: str
    topology: Topology = "mesh"
    latency: float = quantity("s", "of one message, however small")
    bandwidth: float = quantity("B/s", "of one cable, one way")
    crossing_seconds: float = quantity(
        "s", "what a collective costs the device beside it: GPU to CPU and back", 0.0
    )
    tables: Mapping[str, CollectiveTable] = field(default_factory=dict)

    def seconds(self, operation: str, num_bytes: Number, num_ranks: int) -> float:
        """One collective, started and waited for, without the crossing.

        Args:
            operation: its name in `Comm`.
            num_bytes: what each rank hands to it.
            num_ranks: P.

        Raises:
            ValueError: there is no such collective.
        """
        if operation not in OPERATIONS:
            raise ValueError(
                f"A collective must be one of {', '.join(OPERATIONS)}; got "
                f"{operation!r}."
            )
        if num_ranks == 1:
            return 0.0
        table = self.tables.get(_ALIKE.get(operation, operation))
        if table is not None and table.ranks == num_ranks:
            return table.at(num_bytes)
        steps, volume = self._path(operation, num_ranks)
        return float(steps) * self.latency + volume * num_bytes / self.bandwidth

    def _path(self, operation: str, num_ranks: int) -> tuple[Number, Number]:
        """Messages one after another, and payloads that pass one cable one way."""
        others = num_ranks - 1
        capability = CAPABILITIES[self.transport]
        if operation in ("all_to_all", "all_to_all_v"):
            schedule = choose_schedule(capability, num_ranks)
            if schedule.kind == "exchange":
                return 1, 1 / num_ranks
            if schedule.kind == "gather":
                return self._path("all_gather", num_ranks)
            # Sends and receives that block: the two ways of a cable in turn.
            rounds = 2 * len(schedule.rounds)
            chunks = sum(_most_chunks(step) for step in schedule.rounds)
            return rounds, 2 * chunks / num_ranks
        scatters = "sum_scatter" in capability.operations
        if operation == "reduce_scatter" and not scatters:
            operation = "all_reduce"  # of which a rank keeps its part
        if self.topology == "mesh":
            # Every rank sends to all others at once, each over a cable of its own.
            return 1, 1 / num_ranks if operation == "reduce_scatter" else 1
        if operation == "all_gather":
            return others, others
        if operation == "reduce_scatter":
            return others, others / num_ranks
        return 2 * others, 2 * others / num_ranks


def _most_chunks(step: Round) -> int:
    """Of a round of an all-to-all: the most chunks that one rank sends."""
    return max(Counter(t.source for t in step.transfers).values())


OPERATIONS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "all_to_all_v",
    "broadcast",
)
# Measured alike: a broadcast is a sum in which all but one contribute zeros.
_ALIKE = {"all_to_all_v": "all_to_all", "broadcast": "all_reduce"}


def slowest_matrix(costs: Sequence[MatrixCost]) -> MatrixCost | None:
    """Of several ranks' measurements the slowest of each; None: no rows in common."""
    common = sorted(set.intersection(*(set(c.rows) for c in costs)))
    if not common:
        return None
    seconds = [max(c.seconds[c.rows.index(rows)] for c in costs) for rows in common]
    return MatrixCost(
        rows=tuple(common),
        seconds=tuple(seconds),
        call_seconds=max(c.call_seconds for c in costs),
        visit_seconds=max(c.visit_seconds for c in costs),
        pair_seconds=max(c.pair_seconds for c in costs),
    )


def slowest_link(links: Sequence[Link]) -> Link:
    """One link of several ranks, as slow as the slowest of them says.

    Tables are kept that all have for the same sizes: a collective takes as long as its
    longest rank.
    """
    first = links[0]
    tables = {}
    for operation, table in first.tables.items():
        every = [link.tables.get(operation) for link in links]
        alike = [t for t in every if t is not None and _sizes(t) == _sizes(table)]
        if len(alike) == len(links):
            seconds = zip(*(t.seconds for t in alike), strict=True)
            tables[operation] = replace(table, seconds=tuple(map(max, seconds)))
    return replace(
        first,
        latency=max(link.latency for link in links),
        bandwidth=min(link.bandwidth for link in links),
        crossing_seconds=max(link.crossing_seconds for link in links),
        tables=tables,
    )


def _sizes(table: CollectiveTable) -> tuple[float, tuple[Number, ...]]:
    return table.ranks, table.bytes
