"""What a rank did and holds."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, fields


@dataclass
class Counters:
    """What this rank did since the last `reset`.

    Attributes:
        layer_calls: MoE layers entered.
        pairs_routed: (row, expert) choices that this rank looked at; with the strategy
            `replicated` all that the router made.
        pairs_computed: (row, slot) pairs that this rank computed.
        collectives: collectives that MoE layers started.
        collective_bytes: bytes of their payload on this rank.
    """

    layer_calls: int = 0
    pairs_routed: int = 0
    pairs_computed: int = 0
    collectives: int = 0
    collective_bytes: int = 0

    def count_collective(self, num_bytes: int) -> None:
        self.collectives += 1
        self.collective_bytes += num_bytes

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, 0)


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
