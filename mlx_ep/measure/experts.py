"""What each runner takes for experts: measured, and told apart into a `MatrixCost`.

As in `measure_costs`, every function must be called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.cost.profile import OWN_BLOCK, cost_key
from mlx_ep.cost.records import MatrixCost
from mlx_ep.experts import RUNNERS, expert_weights, options
from mlx_ep.measure.costs import ROWS, TINY, in_groups, sizes
from mlx_ep.measure.timer import Timer
from mlx_ep.metrics import Counters
from mlx_ep.tune.timing import Timed
from mlx_ep.types import Packing, Rows

NARROWER = 4  # the second expert width, which tells apart what does not grow with it
MANY_ROWS = 16  # and the second number of rows


def random_switch(
    width: int, expert_width: int, packing: Packing, dtype: mx.Dtype
) -> nn.Module:
    """mlx-lm's switch with experts of random numbers."""
    switch = SwitchGLU(width, expert_width, sizes().slots)
    switch.set_dtype(dtype)
    if packing.is_packed:
        nn.quantize(switch, packing.group_size, packing.bits, mode=packing.mode)
    # sync: what is timed must not include making its arguments.
    mx.eval(switch.parameters())
    return switch


def expert_costs(
    timer: Timer, width: int, expert_width: int, packing: Packing, dtype: mx.Dtype
) -> dict[str, MatrixCost]:
    """Every runner that can run such experts here, and mlx-lm's own block, by
    `cost_key`.

    Args:
        width: D.
        expert_width: F.
        dtype: of the rows, and of scales and offsets.
    """

    def switches(rows: int) -> list[nn.Module]:
        num_bytes = packing.num_bytes(3 * width * rows) * sizes().slots
        return in_groups(num_bytes, lambda: random_switch(width, rows, packing, dtype))

    wide, narrow = switches(expert_width), switches(expert_width // NARROWER)
    tiny = [random_switch(TINY, TINY, packing, dtype)]
    weights = expert_weights(wide[0])
    assert weights is not None
    own = _expert_cost(timer, _own_block, wide, narrow, tiny, dtype)
    found = {cost_key(OWN_BLOCK, weights.up.packing): own}
    for option, why in options(wide[0]).items():
        if timer.agreed(why):
            continue
        with mx.stream(option.stream or mx.default_device()):
            cost = _expert_cost(
                timer, partial(_runner, option.runner), wide, narrow, tiny, dtype
            )
        key = cost_key(option.runner, weights.up.packing)
        # A runner that has two backends is the faster of the two.
        if key not in found or cost.seconds[0] < found[key].seconds[0]:
            found[key] = cost
    return found


# What experts compute for rows, made of their switch.
_Compute = Callable[[Rows], mx.array]


def _runner(name: str, switch: nn.Module) -> _Compute:
    """A runner of this package."""
    runner = RUNNERS[name](switch)
    return lambda visits: runner.partial_sum(visits, Counters())


def _own_block(switch: nn.Module) -> _Compute:
    """What a block of mlx-lm does with its switch."""
    return lambda visits: (
        switch(visits.x, visits.slot_ids) * visits.gates[..., None]
    ).sum(axis=-2)


def _expert_cost(
    timer: Timer,
    made: Callable[[nn.Module], _Compute],
    wide: Sequence[nn.Module],
    narrow: Sequence[nn.Module],
    tiny: Sequence[nn.Module],
    dtype: mx.Dtype,
) -> MatrixCost:
    """Tells apart what grows with weights, with rows, with experts and with nothing.

    With S experts that each get r rows of D numbers, a call takes

        call + S * visit + S * r * D * pair + S * weights * per_weight(r).

    Two expert widths give per_weight at r=1 and r=16, what is left there gives visit
    and pair, and the others follow.

    Args:
        wide, narrow, tiny: switches that are alike, see `in_groups`.
    """
    parts = expert_weights(wide[0])
    assert parts is not None
    width, weights, slots = parts.up.columns, parts.weights_per_slot, parts.num_slots
    call = timer.typical(_experts_call(made, tiny, 1, 1, dtype))
    calls = [(float(r), _experts_call(made, wide, r, slots, dtype)) for r in ROWS]
    times = dict(timer.series(calls))
    many = max(r for r in times if r <= MANY_ROWS)
    less = {
        r: timer.typical(_experts_call(made, narrow, int(r), slots, dtype))
        for r in (1.0, many)
    }
    # What a call takes however narrow its experts are, without the call itself.
    rest = {}
    for rows, narrow_seconds in less.items():
        slope = (times[rows] - narrow_seconds) / (1 - 1 / NARROWER)
        rest[rows] = max(0.0, times[rows] - slope - call) / slots
    pair = max(0.0, rest[many] - rest[1.0]) / ((many - 1) * width) if many > 1 else 0.0
    visit = max(0.0, rest[1.0] - width * pair)
    per_weight = [
        max(0.0, (seconds - call) / slots - visit - rows * width * pair) / weights
        for rows, seconds in times.items()
    ]
    return MatrixCost(
        rows=tuple(times),
        seconds=tuple(per_weight),
        call_seconds=call,
        visit_seconds=visit,
        pair_seconds=pair,
    )


def _experts_call(
    made: Callable[[nn.Module], _Compute],
    switches: Sequence[nn.Module],
    rows: int,
    slots: int,
    dtype: mx.Dtype,
) -> Timed:
    """A call in which each of so many rows visits each of the first slots; the switches
    take turns.
    """
    parts = expert_weights(switches[0])
    assert parts is not None
    shape = (rows, slots)
    key = mx.random.key(0)
    x = mx.random.normal((rows, parts.up.columns), key=key).astype(dtype)
    ids = mx.contiguous(mx.broadcast_to(mx.arange(slots, dtype=mx.int32), shape))
    visits = Rows(x, ids, mx.full(shape, 1 / slots))
    # sync: what is timed must not include making its arguments.
    mx.eval(visits)
    turns = cycle([made(switch) for switch in switches])

    def run() -> None:
        # sync: this is what is timed.
        mx.eval(next(turns)(visits))

    return run
