"""One trace on many clusters of Macs: how many, of which chip, run in which way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_ep.cost.profile import Profile
from mlx_ep.cost.shape import ModelShape
from mlx_ep.simulate.cluster import Cluster, Instance, LinkLevel
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.memory import GIB, KvPool, kv_blocks
from mlx_ep.simulate.model import ModelSizes
from mlx_ep.simulate.placed import most_slots, placement_of
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.times.profile_times import ProfileTimes
from mlx_ep.simulate.traces import Trace


@dataclass(frozen=True)
class Way:
    """A way to run a model on P devices.

    Attributes:
        name: for a person; the flags of this package that ask for it.
        tp, ep: of an instance, 0: P.
        split: over how many devices dense weights and caches are, 0: P.
        members: instances in lock step, 0: P.
        exchange: see `ProfileTimes`.
        needs_split: the model must have a `shard()`.
    """

    name: str
    tp: int
    ep: int
    split: int
    members: int
    exchange: str
    needs_split: bool


WAYS = (
    Way("one Mac alone", 1, 1, 1, 1, "allgather", False),
    Way("tp: mlx-lm's shard()", 0, 1, 0, 1, "allgather", True),
    Way("ep, --attention replicated", 0, 0, 1, 1, "replicated", False),
    Way("ep, --attention tensor", 0, 0, 0, 1, "allgather", True),
    Way("ep, --attention data, gathered", 1, 0, 1, 0, "gathered", False),
    Way("ep, --attention data, all_to_all", 1, 0, 1, 0, "all_to_all", False),
)


@dataclass(frozen=True)
class Candidate:
    """A cluster, a way to run it, and what the trace took; times in ms.

    Attributes:
        devices: how many Macs.
        memory: bytes of weights and blocks in use on the fullest Mac.
        price: of all Macs; None: not given.
        why_not: why it cannot run, or "".
    """

    chip: str
    devices: int
    way: str
    throughput: float = 0.0
    ttft: float = 0.0
    ttft_p99: float = 0.0
    tpot: float = 0.0
    memory: float = 0.0
    price: float | int | None = None
    why_not: str = ""


def simulate_candidates(
    trace: Trace,
    sizes: ModelSizes,
    shape: ModelShape,
    profiles: Mapping[str, Profile],
    most: int,
    *,
    settings: EngineSettings,
    prices: Mapping[str, float | int] | None = None,
    split_problem: Callable[[int], str] = lambda devices: "",
    link: str | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Candidate]:
    """Every way on 1, 2, 4 .. and `most` Macs of every chip.

    Args:
        profiles: by the name of the chip.
        prices: of one Mac, by the same names.
        split_problem: why the dense part cannot be split over so many, or "".
        link: of the profiles; None: their first.
        progress: is told when one is done.
    """
    counts = sorted({*(2**i for i in range(12) if 2**i <= most), most})
    found = []
    for chip, profile in profiles.items():
        price = (prices or {}).get(chip)
        for devices in counts:
            for way in WAYS:
                if (devices == 1) != (way is WAYS[0]):
                    continue
                cost = None if price is None else price * devices
                problem = split_problem(devices) if way.needs_split else ""
                if not problem and way.needs_split and not shape.has_shard:
                    problem = "mlx-lm has no shard() for it"
                one = Candidate(chip, devices, way.name, price=cost, why_not=problem)
                if not problem:
                    one = _serve(one, trace, sizes, shape, profile, way, settings, link)
                found.append(one)
                progress(1)
    return found


def _serve(
    named: Candidate,
    trace: Trace,
    sizes: ModelSizes,
    shape: ModelShape,
    profile: Profile,
    way: Way,
    settings: EngineSettings,
    link: str | None,
) -> Candidate:
    devices = named.devices
    try:
        group = _group(sizes, profile, devices, way, settings)
        times = ProfileTimes(group, profile, shape, way.exchange, link)
        none = LinkLevel(1.0, 0.0)
        cluster = Cluster(
            file=f"{devices} x {profile.name}",
            instances=group,
            groups=[group],
            devices=none,
            instances_link=none,
            nodes_link=none,
        )
        engine = Simulation(cluster, trace, [times])
    except ValueError as error:
        return replace(named, why_not=str(error))
    engine.run()
    log = engine.groups[0].log
    ttft, tpot, outputs = [], [], 0
    for request in engine.requests:
        ends = engine.times_of(request)
        outputs += len(ends)
        ttft.append(int(ends[0]) - request.arrival)
        if len(ends) > 1:
            tpot.append((int(ends[-1]) - int(ends[0])) / (len(ends) - 1))
    return replace(
        named,
        throughput=outputs / max(int(log.ends[-1]) / 1e9, 1e-9),
        ttft=float(np.mean(ttft)) / 1e6,
        ttft_p99=float(np.percentile(ttft, 99)) / 1e6,
        tpot=float(np.mean(tpot)) / 1e6 if tpot else 0.0,
        memory=max(stretch.memory for stretch in log.stretches),
    )


def _group(
    sizes: ModelSizes,
    profile: Profile,
    devices: int,
    way: Way,
    settings: EngineSettings,
) -> tuple[Instance, ...]:
    """Raises:
    ValueError: it does not fit.
    """
    split, members = way.split or devices, way.members or devices
    placement = None
    if devices > 1 and way.ep == 0:
        placement = placement_of(sizes, settings, devices)
    # Tensor parallelism splits every expert, which takes as much as whole ones do.
    slots = most_slots(placement)
    weights = sizes.weight_bytes(split, devices, 1, settings.itemsize, slots)
    limit = profile.memory_bytes
    if weights >= limit:
        raise ValueError(
            f"{weights / GIB:.1f} GiB of weights, {limit / GIB:.1f} GiB of memory"
        )
    held = sizes.kv_token_bytes(settings.kv_itemsize)
    token_bytes = held / sizes.kv_split(split)
    pool: KvPool = kv_blocks(limit, weights, token_bytes, settings, utilization=1.0)
    return tuple(
        Instance(
            where=f"instance {index}",
            index=index,
            node=0,
            model=sizes,
            hardware=profile.name,
            memory=limit / GIB,
            pd_type=None,
            tp=way.tp or devices,
            pp=1,
            ep=way.ep or devices,
            dp_group="A" if members > 1 else None,
            settings=settings,
            pool=pool,
            placement=placement,
        )
        for index in range(members)
    )


def pick(
    candidates: Sequence[Candidate],
    most_ttft: float | int | None = None,
    most_tpot: float | int | None = None,
) -> Candidate | None:
    """The cheapest that keeps the limits, by price or else by the number of Macs; of
    those the one with the most tokens per second. None: there is none.

    Args:
        most_ttft, most_tpot: means, ms; None: no limit.
    """

    def keeps(one: Candidate) -> bool:
        if one.why_not:
            return False
        is_soon = most_ttft is None or one.ttft <= most_ttft
        return is_soon and (most_tpot is None or one.tpot <= most_tpot)

    left = [one for one in candidates if keeps(one)]
    has_prices = all(one.price is not None for one in left)

    def cost(one: Candidate) -> tuple[float, float]:
        first = one.price if has_prices and one.price is not None else one.devices
        return float(first), -one.throughput

    if most_ttft is None and most_tpot is None:  # nothing to keep: the fastest
        return max(left, key=lambda one: one.throughput, default=None)
    return min(left, key=cost, default=None)


def candidates_rows(candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    """Columns for a person."""
    rows: list[tuple[str, ...]] = [
        ("chip", "Macs", "way", "tok/s", "TTFT ms", "P99", "TPOT ms", "GB", "price", "")
    ]
    for one in candidates:
        numbers: Sequence[str] = ("-",) * 5
        if not one.why_not:
            numbers = (
                f"{one.throughput:.1f}",
                f"{one.ttft:.0f}",
                f"{one.ttft_p99:.0f}",
                f"{one.tpot:.1f}",
                f"{one.memory / 1e9:.1f}",
            )
        price = "-" if one.price is None else f"{one.price:.0f}"
        rows.append((one.chip, str(one.devices), one.way, *numbers, price, one.why_not))
    return rows


def as_json(candidate: Candidate | None) -> dict[str, Any] | None:
    return None if candidate is None else dict(vars(candidate))
