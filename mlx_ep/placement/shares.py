"""How many experts each rank gets, and how much of their width. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mlx_ep.placement.placement import Placement


@dataclass(frozen=True)
class ExpertSizes:
    """What there is to divide among ranks.

    Attributes:
        num_experts: E, the same in every MoE layer.
        expert_bytes: of one expert, in all layers together.
        dense_bytes: what every rank holds beside its experts.
        widths: F, each that occurs in a MoE layer, ascending.
        unit: columns of the width that stay together (a quantization group of the
            down matrix).
    """

    num_experts: int
    expert_bytes: int
    dense_bytes: int
    widths: tuple[int, ...]
    unit: int = 1


def place(
    sizes: ExpertSizes,
    num_ranks: int,
    *,
    ep_size: int | None = None,
    memory: Sequence[int] | None = None,
    reserved_bytes: int = 0,
    must_fit: bool = True,
) -> Placement:
    """Consecutive experts on every rank, or on every group of ranks.

    Without `memory` all get the same number, the first ones the remainder. With it,
    experts are in proportion to what remains of a rank's memory for them, rounded so
    that no rank holds more than it can where any rounding allows that.

    Args:
        sizes: of the model.
        num_ranks: P.
        ep_size: N, the groups of ``P / N`` consecutive ranks. An expert belongs to a
            group, whose ranks share its width. None: P, a rank holds whole experts.
        memory: bytes that each rank may hold; None: equal ranks.
        reserved_bytes: of every rank's memory, beside the dense part and the experts.
        must_fit: whether too little memory is an error; else experts are in proportion
            to it all the same.

    Raises:
        ValueError: the numbers do not go together, or the experts do not fit.
    """
    ep_size = num_ranks if ep_size is None else ep_size
    if not 1 <= ep_size <= num_ranks or num_ranks % ep_size:
        raise ValueError(
            f"--ep must be a number of equal groups of the {num_ranks} ranks, one of "
            f"{', '.join(str(n) for n in _divisors(num_ranks))}; got {ep_size}."
        )
    if memory is not None and len(memory) != num_ranks:
        raise ValueError(
            f"--memory must name one number per rank, {num_ranks} of them; got "
            f"{len(memory)}."
        )
    free: list[int] | None = None
    if memory is not None:
        taken = sizes.dense_bytes + reserved_bytes
        free = [max(num_bytes - taken, 0) for num_bytes in memory]
    try:
        return _place(sizes, num_ranks, ep_size, free)
    except _TooLittleError as error:
        if must_fit:
            assert free is not None
            raise ValueError(
                _too_little(sizes, free, error.room, reserved_bytes)
            ) from None
        # As if there were more of everything, in the same proportion.
        free = [sizes.num_experts * sizes.expert_bytes * (n + 1) for n in free or ()]
        return _place(sizes, num_ranks, ep_size, free)


class _TooLittleError(Exception):
    """The experts do not fit; there is room for fewer."""

    def __init__(self, room: int) -> None:
        self.room = room


def _place(
    sizes: ExpertSizes, num_ranks: int, ep_size: int, free: Sequence[int] | None
) -> Placement:
    if ep_size == num_ranks:
        return Placement.from_counts(_whole_experts(sizes, num_ranks, free))
    return _parted_experts(sizes, num_ranks, ep_size, free)


def apportion(
    total: int, weights: Sequence[int], limits: Sequence[int] | None = None
) -> list[int]:
    """`total` things in proportion to `weights`, by D'Hondt's method.

    Each thing goes to the weight that has the most of itself per thing then held; on
    a tie, the first. Where the limits are ``weight // size`` for some size, no limit is
    exceeded as long as their sum is `total` or more: the method gives ``weight //
    quotient`` for one quotient, which is then at least `size`.

    Args:
        total: how many things.
        weights: 0 or more; a weight of 0 gets nothing.
        limits: most things for each weight.

    Raises:
        ValueError: the limits, or weights that are all 0, leave things over.
    """
    counts = [0] * len(weights)
    queue = [(-Fraction(weight), i) for i, weight in enumerate(weights) if weight > 0]
    heapq.heapify(queue)
    for _ in range(total):
        while (
            queue and limits is not None and counts[queue[0][1]] >= limits[queue[0][1]]
        ):
            heapq.heappop(queue)
        if not queue:
            raise ValueError(
                f"{total} cannot be divided: weights {list(weights)}, limits {limits}."
            )
        first = queue[0][1]
        counts[first] += 1
        share = -Fraction(weights[first], counts[first] + 1)
        heapq.heapreplace(queue, (share, first))
    return counts


def _whole_experts(
    sizes: ExpertSizes, num_ranks: int, free: Sequence[int] | None
) -> list[int]:
    if free is None:
        return apportion(sizes.num_experts, [1] * num_ranks)
    limits = [num_bytes // max(sizes.expert_bytes, 1) for num_bytes in free]
    if sum(limits) < sizes.num_experts:
        raise _TooLittleError(sum(limits))
    return apportion(sizes.num_experts, free, limits)


def _parted_experts(
    sizes: ExpertSizes,
    num_ranks: int,
    ep_size: int,
    free: Sequence[int] | None,
) -> Placement:
    group_size = num_ranks // ep_size
    units = _num_units(sizes, ep_size, group_size)
    if free is None:
        counts = apportion(sizes.num_experts, [1] * ep_size)
        widths = [apportion(units, [1] * group_size)] * ep_size
    else:
        groups = [free[i : i + group_size] for i in range(0, num_ranks, group_size)]
        # Rounded up, since the first part also holds the bias of the down matrix.
        unit_bytes = -(-sizes.expert_bytes // units)
        limits = [_capacity(group, units, unit_bytes) for group in groups]
        if sum(limits) < sizes.num_experts:
            raise _TooLittleError(sum(limits))
        counts = apportion(sizes.num_experts, [sum(g) for g in groups], limits)
        widths = [
            _widths(group, units, count * unit_bytes)
            for group, count in zip(groups, counts)
        ]
    return Placement.from_groups(
        counts, [[sizes.unit * n for n in of_ranks] for of_ranks in widths]
    )


def _num_units(sizes: ExpertSizes, ep_size: int, group_size: int) -> int:
    """The parts into which the width can be cut at most."""
    if len(sizes.widths) > 1:
        raise ValueError(
            f"--ep {ep_size} shares an expert's width over {group_size} ranks, which "
            "needs one width in all MoE layers; this model has "
            f"{', '.join(map(str, sizes.widths))}. Leave --ep out."
        )
    width = sizes.widths[0]
    if width % sizes.unit or width // sizes.unit < group_size:
        raise ValueError(
            f"--ep {ep_size} shares an expert's width over {group_size} ranks, in "
            f"multiples of the quantization group of {sizes.unit}; the width of "
            f"{width} is {width / sizes.unit:g} of them. Use a larger --ep."
        )
    return width // sizes.unit


def _capacity(free: Sequence[int], units: int, unit_bytes: int) -> int:
    """Experts that fit a group whose ranks share the width, each at least a unit."""
    low, high = 0, sum(free) // max(units * unit_bytes, 1)
    while low < high:  # whether n fit falls with n
        middle = (low + high + 1) // 2
        held = [num_bytes // (middle * unit_bytes) for num_bytes in free]
        if min(held) >= 1 and sum(held) >= units:
            low = middle
        else:
            high = middle - 1
    return low


def _widths(free: Sequence[int], units: int, unit_bytes: int) -> list[int]:
    """Units of each rank of a group, at least one, in proportion to its memory.

    Args:
        unit_bytes: of one unit of all the group's experts; 0: it has none.
    """
    if unit_bytes == 0:
        return apportion(units, [1] * len(free))
    limits = [num_bytes // unit_bytes - 1 for num_bytes in free]
    more = apportion(units - len(free), [max(n, 1) for n in free], limits)
    return [1 + n for n in more]


def _too_little(
    sizes: ExpertSizes, free: Sequence[int], room: int, reserved: int
) -> str:
    """Why the experts do not fit, with the numbers."""
    each = " and ".join(
        [f"{sizes.dense_bytes / 1e9:.3g} GB of dense weights"]
        + ([f"{reserved / 1e9:.3g} GB for the context"] if reserved else [])
    )
    left = ", ".join(f"{num_bytes / 1e9:.3g}" for num_bytes in free)
    missing = (sizes.num_experts - room) * sizes.expert_bytes
    return (
        f"The memory of {len(free)} ranks must hold {sizes.num_experts} experts of "
        f"{sizes.expert_bytes / 1e9:.3g} GB (all layers); {each} on every rank leave "
        f"{left} GB, room for {room}. Use more ranks, about {missing / 1e9:.3g} GB "
        "more memory, or a smaller quantization."
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
