"""Which numbers of a profile cannot be right: too few samples, or a machine at work.

Pure. Bounds are wide: what any machine that MLX runs on could show lies inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_ep.cost.profile import Profile
from mlx_ep.cost.records import Number

# From, to, and why nothing lies outside.
BOUNDS = {
    "memory_bandwidth": (0.2e9, 10e12, "one core reads more, the fastest HBM less"),
    "copy_bandwidth": (0.05e9, 10e12, "one core copies more, the fastest HBM less"),
    "matmul_rate": (0.05e9, 1e15, "one core computes more, no GPU that MLX runs on"),
    "expert_rate": (0.05e9, 1e15, "one core computes more, no GPU that MLX runs on"),
    "attention_rate": (0.05e9, 1e15, "one core computes more, no GPU that MLX runs on"),
    "layer_seconds": (1e-6, 0.1, "the Python of a layer takes longer than 1 us"),
    "step_seconds": (0.0, 1.0, "a step of a model of 64 numbers takes milliseconds"),
    "sync_seconds": (1e-7, 0.05, "waiting for a device is a system call or more"),
}
LATENCY = (2e-7, 0.1, "shared memory takes 0.2 us, a reply round the earth 0.1 s")
LINK = (1e6, 1e12, "slower than any network, or faster than memory")
# Of times that should not fall as the work grows: noise may be this much.
FALL = 0.5
# With one row of each expert every weight is read for one product: never much faster
# than with many rows.
FEW_ROWS_FACTOR = 4.0


def implausible(profile: Profile) -> list[str]:
    """One line for each number that cannot be right: its bound, and why. Pure."""
    return [
        *_out_of_bounds(profile),
        *_of_experts(profile),
        *_of_links(profile),
    ]


def _out_of_bounds(profile: Profile) -> Iterator[str]:
    for name, (least, most, why) in BOUNDS.items():
        value = getattr(profile, name)
        if not least <= value <= most:
            yield f"{name} = {value:.3g}: must be from {least:g} to {most:g} ({why})"
    best = max(profile.expert_rate, profile.matmul_rate)
    if profile.unsorted_rate > FEW_ROWS_FACTOR * best:
        yield (
            f"unsorted_rate = {profile.unsorted_rate:.3g}: must be at most "
            f"{FEW_ROWS_FACTOR * best:.3g}, {FEW_ROWS_FACTOR:g} times the best rate "
            "with many rows (with one row a weight is read for one product)"
        )


def _of_experts(profile: Profile) -> Iterator[str]:
    costs = [("experts", profile.experts), ("dense", profile.dense)]
    for group, of_group in costs:
        for key, cost in of_group.items():
            where = f"{group}.{key}"
            if min(cost.seconds) <= 0:
                rows = cost.rows[cost.seconds.index(min(cost.seconds))]
                yield (
                    f"{where}: {rows:g} rows take 0 s a weight: must be above 0 (its "
                    "fixed cost came out larger than the whole call: too few samples)"
                )
            yield from _falls(where, "rows", cost.rows, cost.seconds)


def _of_links(profile: Profile) -> Iterator[str]:
    for name, link in profile.links.items():
        for what, value, (least, most, why) in (
            ("latency", link.latency, LATENCY),
            ("bandwidth", link.bandwidth, LINK),
        ):
            if not least <= value <= most:
                yield (
                    f"links.{name}.{what} = {value:.3g}: must be from {least:g} to "
                    f"{most:g} ({why})"
                )
        for operation, table in link.tables.items():
            where = f"links.{name}.{operation}"
            yield from _falls(where, "bytes", table.bytes, table.seconds)


def _falls(
    where: str, unit: str, sizes: Sequence[Number], seconds: Sequence[float]
) -> Iterator[str]:
    """The first time that is far shorter than that of less work."""
    longest: float = 0.0
    at: Number = 0
    for size, took in zip(sizes, seconds, strict=True):
        if 0 < took < FALL * longest:
            yield (
                f"{where}: {size:g} {unit} take {took:.3g} s, {at:g} take "
                f"{longest:.3g} s: must be at least {FALL:g} of it (more work is not "
                "faster; something else ran)"
            )
            return
        if took > longest:
            longest, at = took, size
