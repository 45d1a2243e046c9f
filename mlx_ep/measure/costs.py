"""Times that a profile consists of, measured on all ranks at once.

Every function must be called on every rank: how far a series goes and how often a call
is timed is rank 0's decision, and each sample begins with a barrier. What a rank gets
are its own times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.cost.records import CollectiveTable, MatrixCost
from mlx_ep.measure.timer import Timer
from mlx_ep.rows import uses_metal
from mlx_ep.tune.timing import Timed
from mlx_ep.types import MXFP4, Packing

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TINY = 64  # width of what costs nothing to compute: what is left is the call
Made = TypeVar("Made")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class Amounts:
    """How much is computed, so that it takes longer than starting and waiting for it.

    Attributes:
        slots: experts of a call. All of them together do not fit a GPU's cache.
        matrices: dense ones, one after another.
        numbers: that are read and copied.
        tokens: that choose experts.
        queries: of a prompt.
        keys: that a single query sees.
        cold: bytes of weights between two calls with the same: more than the cache of
            a core holds, as in a step of a model.
    """

    slots: int
    matrices: int
    numbers: int
    tokens: int
    queries: int
    keys: int
    cold: int


ON_CPU = Amounts(4, 4, 1 << 25, 256, 128, 448, 1 << 24)
ON_METAL = Amounts(64, 64, 1 << 28, 4096, 1024, 4032, 1 << 28)  # not tried yet


def sizes() -> Amounts:
    """For the device that MLX computes on."""
    return ON_METAL if uses_metal() else ON_CPU


# While they are timed; scales and plain numbers have the dtype that models have.
PACKINGS = {
    "affine4": Packing.affine(4),
    "affine8": Packing.affine(8),
    "mxfp4": MXFP4,
    "plain": Packing.plain("bfloat16"),
}


def dense_cost(
    timer: Timer, width: int, packing: Packing, dtype: mx.Dtype
) -> tuple[str, MatrixCost]:
    """Square matrices that all rows pass one after another, by their packing.

    Without what as many tiny ones take: calls are counted with the layers.
    """

    count = sizes().matrices

    def some(columns: int) -> list[nn.Module]:
        return [_linear(columns, packing, dtype) for _ in range(count)]

    wide = in_groups(packing.num_bytes(count * width**2), lambda: some(width))
    tiny = [some(TINY)]

    def call(groups: Sequence[list[nn.Module]], rows: int, columns: int) -> Timed:
        turns = cycle(groups)

        def all_of_them(x: mx.array) -> mx.array:
            for linear in next(turns):
                x = linear(x)
            return x

        return _evaluated(all_of_them, _random((rows, columns), dtype))

    found = timer.series([(float(rows), call(wide, rows, width)) for rows in ROWS])
    calls, weights = timer.typical(call(tiny, 1, TINY)), count * width**2
    return str(Packing.of(wide[0][0])), MatrixCost(
        rows=tuple(rows for rows, _ in found),
        seconds=tuple(_above(seconds, calls) / weights for _, seconds in found),
    )


def in_groups(num_bytes: int, make: Callable[[], Made]) -> list[Made]:
    """Equal groups of weights to take in turn, so many that none is found in a cache.

    Args:
        num_bytes: of a group.
    """
    return [make() for _ in range(max(1, -(-sizes().cold // num_bytes)))]


def _linear(width: int, packing: Packing, dtype: mx.Dtype) -> nn.Module:
    linear: nn.Module = nn.Linear(width, width, bias=False)
    linear.set_dtype(dtype)
    if packing.is_packed:
        linear = linear.to_quantized(packing.group_size, packing.bits, packing.mode)
    # sync: what is timed must not include making its arguments.
    mx.eval(linear.parameters())
    return linear


def collective_tables(timer: Timer, sizes: Sequence[int]) -> dict[str, CollectiveTable]:
    """Each collective of `Comm` for float32 payloads of so many bytes per rank."""
    comm = timer.comm
    tables = {}
    for operation in COLLECTIVES:
        run = getattr(comm, operation)
        calls = []
        for size in sizes:
            rows = -(-size // (4 * comm.size)) * comm.size
            calls.append((float(4 * rows), _evaluated(run, _random((rows, 1)))))
        found = timer.series(calls)
        tables[operation] = CollectiveTable(
            ranks=float(comm.size),
            bytes=tuple(size for size, _ in found),
            seconds=tuple(seconds for _, seconds in found),
        )
    return tables


def crossing_seconds(timer: Timer, alone: float) -> float:
    """What a collective costs between operations of the device, above `alone`.

    Args:
        alone: seconds of a collective of a few numbers that is ready to start.
    """
    steps, comm = 16, timer.comm

    def chain(with_collectives: bool) -> None:
        x = mx.ones((64,))
        for _ in range(steps):
            x = x * 0.5
            if with_collectives:
                x = comm.all_reduce(x)
        # sync: this is what is timed.
        mx.eval(x)

    both = timer.typical(partial(chain, True))
    return max(0.0, (both - timer.typical(partial(chain, False))) / steps - alone)


def machine_times(timer: Timer) -> dict[str, float]:
    """What memory allows, and what choosing experts and waiting take."""
    size = sizes()
    wait = timer.typical(_wait)

    def above_wait(function: Callable[[mx.array], mx.array], x: mx.array) -> float:
        return _above(timer.typical(_evaluated(function, x)), wait)

    large = _random((size.numbers,))
    half = large[: size.numbers // 2]
    experts, top_k = 128, 8
    scores = _random((size.tokens, experts), mx.float32)

    def route(scores: mx.array) -> mx.array:
        gates = mx.softmax(scores, axis=-1)
        ids = mx.argpartition(gates, experts - top_k, axis=-1)[:, -top_k:]
        chosen = mx.take_along_axis(gates, ids, axis=-1)
        return chosen / chosen.sum(axis=-1, keepdims=True)

    return {
        "memory_bandwidth": large.nbytes / above_wait(mx.max, large),
        "copy_bandwidth": large.nbytes
        / above_wait(lambda x: mx.concatenate([x, x]), half),
        "route_seconds": above_wait(route, scores) / scores.size,
        "sync_seconds": wait,
    }


def _above(seconds: float, wait: float) -> float:
    """Without what any evaluation takes; noise must not leave nothing."""
    return max(seconds - wait, seconds / 10)


def _wait() -> None:
    # sync: this is what is timed.
    (mx.ones((1,)) + 1).item()


def _evaluated(function: Callable[[mx.array], mx.array], x: mx.array) -> Timed:
    def run() -> None:
        # sync: this is what is timed.
        mx.eval(function(x))

    return run


def _random(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    x = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    # sync: what is timed must not include making its arguments.
    mx.eval(x)
    return x
