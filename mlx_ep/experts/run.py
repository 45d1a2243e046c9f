"""This rank's experts over the rows it got: only its own slots are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32, Integer

from mlx_ep.metrics import Counters
from mlx_ep.rows import OPS, Movement, uses_metal, weighted_slots, with_zero_row
from mlx_ep.types import Rows, to_host

# [N, D] rows and the [N] slot each one visits, ascending -> [N, D] unweighted outputs.
PairRunner = Callable[[mx.array, mx.array], mx.array]


@runtime_checkable
class RowsRunner(Protocol):
    """Runs experts over rows, and sums, in the way it finds best (`mlx_ep.experts`)."""

    def __call__(
        self, rows: Float[mx.array, "N D"], slots: Int32[mx.array, " N"]
    ) -> Float[mx.array, "N D"]:
        """As a `PairRunner`: one unweighted output per (row, slot) pair."""
        ...

    def partial_sum(self, rows: Rows, counters: Counters) -> Float32[mx.array, "M D"]:
        """See `run_experts`."""
        ...


Runner = PairRunner | RowsRunner


class Pairs(NamedTuple):
    """The (row, slot) pairs that live on this rank, slot-major.

    Rows 0 and 1 with slots (2, -1) and (2, 0) give the sequence

        (r0,s2) (r1,s2) (r1,s0)  row-major  ->  (r1,s0) (r0,s2) (r1,s2)  slot-major

    Attributes:
        rows: the row of each pair.
        slots: the slot of each pair, ascending.
        position: the pair of each (row, k); N where slot k is foreign.
    """

    rows: Int32[np.ndarray, " N"]
    slots: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, "M K"]


def group_by_slot(slot_ids: Int32[np.ndarray, "M K"]) -> Pairs:
    """The pairs with a slot on this rank (id >= 0), sorted by slot, rows in order."""
    flat = slot_ids.reshape(-1)
    local = np.flatnonzero(flat >= 0)
    order = local[np.argsort(flat[local], kind="stable")]
    position = np.full(flat.shape, len(order), np.int32)
    position[order] = np.arange(len(order))
    return Pairs(
        rows=(order // slot_ids.shape[1]).astype(np.int32),
        slots=flat[order].astype(np.int32),
        position=position.reshape(slot_ids.shape),
    )


def run_experts(
    rows: Rows, runner: Runner, counters: Counters
) -> Float32[mx.array, "M D"]:
    """Each row's gate-weighted sum over the slots of this rank, in slot order.

    A row that visits no slot of this rank gives zeros. A `RowsRunner` may have an order
    of its own, as long as it is fixed.
    """
    # Not isinstance(): on a protocol it takes 10 us, in every layer of every step.
    own_sum = getattr(runner, "partial_sum", None)
    if own_sum is None:
        return sum_pairs(rows, runner, counters)
    total: mx.array = own_sum(rows, counters)
    return total


def sum_pairs(
    rows: Rows, runner: PairRunner, counters: Counters, movement: Movement = OPS
) -> Float32[mx.array, "M D"]:
    """`run_experts` by way of one output per (row, slot) pair, summed by `movement`."""
    pairs = local_pairs(rows.slot_ids, counters)
    if not len(pairs.rows):
        return mx.zeros(rows.x.shape, mx.float32)
    outputs = _run_pairs(rows.x, pairs, runner)
    if len(pairs.position) == 1 and not uses_metal():
        # One row visits all pairs, in slot order: nothing to look up or to mask. Where
        # there is a choice of movements, the one that was measured sums instead.
        order = mx.array(np.argsort(pairs.position[0], kind="stable")[: len(outputs)])
        return weighted_slots(outputs[None], rows.gates[:, order])
    # Pairs ascend by slot and the foreign ones come last, so that sorting puts each
    # row's own pairs first and in slot order; the columns behind are all "none".
    columns = np.argsort(pairs.position, axis=1, kind="stable")
    width = int((pairs.position < len(pairs.rows)).sum(axis=1).max())
    columns = columns[:, :width]
    pair_ids = np.take_along_axis(pairs.position, columns, axis=1)
    gates = mx.take_along_axis(rows.gates, mx.array(columns), axis=1)
    own = pair_ids < len(pairs.rows)
    gates = mx.where(mx.array(own), gates, 0.0)
    return movement.sum_pairs(outputs, mx.array(np.where(own, pair_ids, -1)), gates)


def run_slots(
    rows: Rows, runner: Runner, counters: Counters
) -> Float[mx.array, "M K D"]:
    """The unweighted output of every (row, k), zeros where slot k is foreign."""
    pairs = local_pairs(rows.slot_ids, counters)
    num_rows, num_slots = rows.slot_ids.shape
    if not len(pairs.rows):
        return mx.zeros((num_rows, num_slots, rows.x.shape[1]), rows.x.dtype)
    outputs = _run_pairs(rows.x, pairs, runner)
    return with_zero_row(outputs)[mx.array(pairs.position)]


def local_pairs(slot_ids: Integer[mx.array, "M K"], counters: Counters) -> Pairs:
    """The pairs of this rank, on the host, counted."""
    # sync: how many pairs are this rank's decides the shapes of what it computes.
    pairs = group_by_slot(to_host(slot_ids).astype(np.int32, copy=False))
    counters.count_pairs(slot_ids, len(pairs.rows))
    return pairs


def _run_pairs(x: mx.array, pairs: Pairs, runner: PairRunner) -> mx.array:
    return runner(x[mx.array(pairs.rows)], mx.array(pairs.slots))
