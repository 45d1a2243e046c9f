"""Time of collectives on rings. Pure.

A ring of n passes a chunk n - 1 times: each time a latency and the chunk over the
bandwidth of one direction.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ep.simulate.cluster import LinkLevel

Levels = Sequence[tuple[int, LinkLevel]]


def gather_ns(levels: Levels, chunk_bytes: float | int) -> float:
    """All-gather: every member hands in `chunk_bytes`; outer levels go first."""
    total = 0.0
    for members, link in levels:
        total += (members - 1) * (link.latency + chunk_bytes / link.bandwidth)
        chunk_bytes *= members
    return total


def scatter_ns(levels: Levels, chunk_bytes: float | int) -> float:
    """Reduce-scatter that leaves every member with `chunk_bytes`: as a gather."""
    return gather_ns(levels, chunk_bytes)


def reduce_ns(levels: Levels, num_bytes: float | int) -> float:
    """All-reduce of `num_bytes`: a reduce-scatter and an all-gather."""
    members = 1
    for count, _ in levels:
        members *= count
    return 2 * gather_ns(levels, num_bytes / members)


def pairs_ns(levels: Levels, pair_bytes: float | int) -> float:
    """All-to-all with `pair_bytes` from each member to each other one."""
    total, members = 0.0, 1
    for count, _ in levels:
        members *= count
    for count, link in levels:
        sent = pair_bytes * members / count if count else 0.0
        total += (count - 1) * (link.latency + sent / link.bandwidth)
    return total


def send_ns(link: LinkLevel, num_bytes: float | int) -> float:
    """One message to one peer."""
    return link.latency + num_bytes / link.bandwidth
