"""This rank's experts over the rows it got: only its own slots are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32, Integer

from mlx_ep.metrics import Counters
from mlx_ep.rows import OPS, Movement, with_zero_row
from mlx_ep.types import Rows, to_host, view_on_host

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

    def partial_sum(self, rows: Rows, counters: Counters) -> Float32[mx.array, "... D"]:
        """See `run_experts`; also of `CompleteRows` with more leading axes."""
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
) -> Float32[mx.array, "... D"]:
    """Each row's gate-weighted sum over the slots of this rank, in slot order, [M, D].

    A row that visits no slot of this rank gives zeros. A `RowsRunner` may have an order
    of its own, as long as it is fixed.
    """
    # Not isinstance(): on a protocol it takes 10 us, in every layer of every step.
    own_sum = getattr(runner, "partial_sum", None)
    if own_sum is None:
        assert rows.x.ndim == 2
        return sum_pairs(rows, runner, counters)
    total: mx.array = own_sum(rows, counters)
    return total


def sum_pairs(
    rows: Rows, runner: PairRunner, counters: Counters, movement: Movement = OPS
) -> Float32[mx.array, "M D"]:
    """`run_experts` by way of one output per (row, slot) pair, summed by `movement`."""
    pairs, host_gates = pairs_with_gates(rows, counters)
    if not len(pairs.rows):
        return mx.zeros(rows.x.shape, mx.float32)
    outputs = _run_pairs(rows.x, pairs, runner)
    pair_ids, gates = by_row(pairs, host_gates)
    return movement.sum_pairs(outputs, mx.array(pair_ids), mx.array(gates))


def by_row(
    pairs: Pairs, gates: Float32[np.ndarray, " N"]
) -> tuple[Int32[np.ndarray, "M C"], Float32[np.ndarray, "M C"]]:
    """The pairs of each row, in slot order, and their gates; then -1 and gate 0.

    Args:
        gates: of each pair.
    """
    num_rows = pairs.position.shape[0]
    order = np.argsort(pairs.rows, kind="stable")  # slots ascend within a row
    rows = pairs.rows[order]
    counts = np.bincount(rows, minlength=num_rows)
    starts = np.cumsum(counts) - counts
    columns = np.arange(len(order)) - starts[rows]
    pair_ids = np.full((num_rows, counts.max()), -1, np.int32)
    pair_ids[rows, columns] = order
    row_gates = np.zeros(pair_ids.shape, np.float32)
    row_gates[rows, columns] = gates[order]
    return pair_ids, row_gates


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


def pairs_with_gates(
    rows: Rows, counters: Counters
) -> tuple[Pairs, Float32[np.ndarray, " N"]]:
    """`local_pairs`, and the gate of each pair, by one wait."""
    # sync: all that the host reads, at once.
    mx.eval(rows.slot_ids, rows.gates)
    pairs = local_pairs(rows.slot_ids, counters)
    gates = np.empty(len(pairs.rows) + 1, np.float32)
    # sync: evaluated above. The last one takes those of foreign slots.
    gates[pairs.position.reshape(-1)] = view_on_host(rows.gates).reshape(-1)
    return pairs, gates[:-1]


def _run_pairs(x: mx.array, pairs: Pairs, runner: PairRunner) -> mx.array:
    return runner(x[mx.array(pairs.rows)], mx.array(pairs.slots))
