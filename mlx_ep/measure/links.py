"""What connects each two ranks, one pair after another, and what it should give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from mlx_ep.comm import Comm, GroupComm, Transport, gather_objects
from mlx_ep.comm.schedules import pairwise_schedule
from mlx_ep.cost.profile import find_profile
from mlx_ep.tune.timing import in_turn

SMALL, LARGE = 1 << 8, 4 << 20  # bytes
SAMPLES = 9
# The published profile whose links are what a Mac's should give.
PUBLISHED = "m3-ultra"


@dataclass(frozen=True, kw_only=True)
class LinkTime:
    """One link as it was measured.

    Attributes:
        ranks: the two ends; all ranks where only collectives can be timed, which use
            all links at once.
        latency: seconds of a message of 256 bytes, one way, as this package sends it.
        bandwidth: bytes per second, one way, between 256 bytes and 4 MiB; None: the
            large message took no longer than the small one, so there is no rate.
        expected_latency, expected_bandwidth: None: there is no expectation.
        source: of the expectation, or why there is none.
    """

    ranks: tuple[int, ...]
    latency: float
    bandwidth: float | None
    expected_latency: float | None = None
    expected_bandwidth: float | None = None
    source: str = ""

    @property
    def is_slow(self) -> bool:
        """Less than half of what is expected."""
        late = self.latency > 2 * (self.expected_latency or float("inf"))
        if self.bandwidth is None:
            return late
        return late or self.bandwidth < 0.5 * (self.expected_bandwidth or 0.0)


def measure_links(comm: GroupComm, hosts: Sequence[str]) -> list[LinkTime]:
    """Every link, alike on every rank. Every rank must call it.

    A pair sends a message there and back while the others wait. On JACCL messages of
    changing size are not safe (ml-explore/mlx#3149): a small and a large sum over all
    ranks are timed instead.

    Args:
        hosts: of every rank, as `host_id` names them.
    """
    if comm.size == 1:
        return []
    if comm.capability.is_fixed_shape:
        seconds = [_fastest(comm, partial(_sum, comm, n)) for n in (SMALL, LARGE)]
        steps, volume = 1.0, 1.0
        if comm.transport == "jaccl-ring":
            steps, volume = 2.0 * (comm.size - 1), 2.0 * (comm.size - 1) / comm.size
        found = [_link(tuple(range(comm.size)), seconds, steps, volume)]
    else:
        pairs = GroupComm(comm.group, schedule=pairwise_schedule(comm.size))
        found = [_pair(pairs, *ends) for ends in _neighbours(comm)]
    mine = [(link.latency, link.bandwidth) for link in found]
    ranks = gather_objects(comm, mine)
    agreed = []
    for index, link in enumerate(found):
        ends = [ranks[rank][index] for rank in link.ranks]
        rates = [rate for _, rate in ends if rate is not None]
        link = replace(
            link,
            latency=max(seconds for seconds, _ in ends),
            bandwidth=min(rates) if len(rates) == len(ends) else None,
        )
        agreed.append(with_expectation(link, comm.transport, hosts))
    return agreed


def with_expectation(
    link: LinkTime, transport: Transport, hosts: Sequence[str]
) -> LinkTime:
    """The link with what its transport should give over a Thunderbolt 5 cable. Pure."""
    if len({hosts[rank] for rank in link.ranks}) < len(link.ranks):
        return replace(link, source="no expectation: ranks of one host")
    name = "ring" if transport == "ring" else "jaccl"
    if transport == "mpi":
        return replace(link, source="no expectation: MPI takes any network")
    profile = find_profile(PUBLISHED)
    published = profile.links[name]
    source = profile.source(f"links.{name}.bandwidth").partition(": ")[0]
    return replace(
        link,
        expected_latency=published.latency,
        expected_bandwidth=published.bandwidth,
        source=f"Thunderbolt 5, {source}",
    )


def _neighbours(comm: GroupComm) -> list[tuple[int, int]]:
    """The pairs of ranks that messages go between directly."""
    size = comm.size
    pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
    if comm.capability.peers == "any":
        return pairs
    return [(a, b) for a, b in pairs if b - a in (1, size - 1)]


def _pair(comm: GroupComm, a: int, b: int) -> LinkTime:
    seconds = [
        _fastest(comm, partial(_there_and_back, comm, a, b, n)) for n in (SMALL, LARGE)
    ]
    return _link((a, b), seconds, steps=2.0, volume=2.0)


def _link(
    ranks: tuple[int, ...], seconds: Sequence[float], steps: float, volume: float
) -> LinkTime:
    small, large = seconds
    rise = large - small
    return LinkTime(
        ranks=ranks,
        latency=small / steps,
        bandwidth=volume * (LARGE - SMALL) / rise if rise > 0 else None,
    )


def _there_and_back(comm: GroupComm, a: int, b: int, num_bytes: int) -> None:
    counts = [0] * comm.size
    if comm.rank in (a, b):
        counts[b if comm.rank == a else a] = num_bytes // 4
    x = mx.zeros((sum(counts), 1), mx.float32)
    # sync: this is what is timed.
    mx.eval(comm.all_to_all_v(x, counts, counts))


def _sum(comm: Comm, num_bytes: int) -> None:
    # sync: this is what is timed.
    mx.eval(comm.all_reduce(mx.zeros((num_bytes // 4,))))


def _fastest(comm: Comm, call: partial[None]) -> float:
    """What the link can give: on a busy machine a median is that of its load."""
    samples = in_turn({"": call}, rounds=SAMPLES + 1, before=comm.barrier)[""]
    return min(samples[1:])
