"""This rank's experts over the rows it got: only its own slots are computed."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32, Integer

from mlx_ep.metrics import Counters
from mlx_ep.rows import OPS, Movement, with_zero_row
from mlx_ep.types import Rows, lists_of_rows, to_host, view_on_host

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
        """See `run_experts`; `CompleteRows`, and one row, may have more axes."""
        ...


Runner = PairRunner | RowsRunner

# (row, slot) pairs, foreign ones among them, up to which they are sorted in Python: in
# decode NumPy's functions take 10 to 60 us each (measured on x86), lists a few in all;
# it seems to be the layer's weights, which have gone through the caches in between.
FEW_PAIRS = 256
_first = itemgetter(0)


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
    own = own_pairs(rows, counters)
    if not len(own.slots):
        return mx.zeros(rows.x.shape, mx.float32)
    outputs = runner(rows.x[mx.array(own.rows)], mx.array(own.slots))
    pair_ids, gates = by_row(own, len(rows.slot_ids))
    return movement.sum_pairs(outputs, mx.array(pair_ids), mx.array(gates))


class OwnPairs(NamedTuple):
    """The (row, slot) pairs of this rank as in `Pairs`, slot-major, with their gates.

    Attributes:
        rows, slots: int32 where they are of NumPy.
        gates: float32 where they are of NumPy.
    """

    rows: list[int] | np.ndarray
    slots: list[int] | np.ndarray
    gates: list[float] | np.ndarray


def own_pairs(rows: Rows, counters: Counters) -> OwnPairs:
    """The pairs of this rank, on the host by one wait, counted."""
    # sync: how many pairs are this rank's decides the shapes of what it computes.
    mx.eval(rows.slot_ids, rows.gates)
    if rows.slot_ids.size > FEW_PAIRS:
        pairs = local_pairs(rows.slot_ids, counters)
        gates = np.empty(len(pairs.rows) + 1, np.float32)
        # sync: evaluated above. The last one takes those of foreign slots.
        gates[pairs.position.reshape(-1)] = view_on_host(rows.gates).reshape(-1)
        return OwnPairs(pairs.rows, pairs.slots, gates[:-1])
    slots_of, gates_of = map(lists_of_rows, (rows.slot_ids, rows.gates))
    own: list[tuple[int, int, float]] = []
    for row, (row_slots, row_gates) in enumerate(zip(slots_of, gates_of, strict=True)):
        own += [(s, row, g) for s, g in zip(row_slots, row_gates) if s >= 0]
    own.sort(key=_first)  # stable: rows of a slot stay in order, choices of a row too
    counters.count_pairs(rows.slot_ids, len(own))
    if not own:
        return OwnPairs([], [], [])
    slots, in_rows, own_gates = zip(*own)
    return OwnPairs(list(in_rows), list(slots), list(own_gates))


def by_row(
    own: OwnPairs, num_rows: int
) -> tuple[list[list[int]] | np.ndarray, list[list[float]] | np.ndarray]:
    """The pairs of each row, in slot order, and their gates; then -1 and gate 0.

    Returns:
        [M, C] each, C the most pairs of a row.
    """
    if isinstance(own.rows, np.ndarray):
        order = np.argsort(own.rows, kind="stable")  # slots ascend within a row
        rows = own.rows[order]
        counts = np.bincount(rows, minlength=num_rows)
        starts = np.cumsum(counts) - counts
        columns = np.arange(len(order)) - starts[rows]
        pair_ids = np.full((num_rows, counts.max()), -1, np.int32)
        pair_ids[rows, columns] = order
        row_gates = np.zeros(pair_ids.shape, np.float32)
        row_gates[rows, columns] = np.asarray(own.gates)[order]  # on host
        return pair_ids, row_gates
    ids_of: list[list[int]] = [[] for _ in range(num_rows)]
    gates_of: list[list[float]] = [[] for _ in range(num_rows)]
    for pair, (row, gate) in enumerate(zip(own.rows, own.gates, strict=True)):
        ids_of[row].append(pair)
        gates_of[row].append(gate)
    most = max(map(len, ids_of))
    for ids, gates in zip(ids_of, gates_of, strict=True):
        ids += [-1] * (most - len(ids))
        gates += [0.0] * (most - len(gates))
    return ids_of, gates_of


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
