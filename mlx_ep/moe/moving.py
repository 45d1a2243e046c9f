"""Slots of a layer move between ranks: weights go where a new placement has them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from jaxtyping import Shaped

from mlx_ep.comm import Comm
from mlx_ep.placement import Moves

# Most bytes that go from one rank to another at once, but for one expert's parameter.
ROUND_BYTES = 2 * 2**20


def move_slots(
    parameter: Shaped[mx.array, "L ..."],
    moves: Moves,
    comm: Comm,
    round_bytes: int = ROUND_BYTES,
) -> Shaped[mx.array, "M ..."]:
    """A stacked parameter of this rank's slots as a new placement has them.

        rank 0 (e0 e1), rank 1 (e2 e3)  ->  rank 0 (e0 e2), rank 1 (e3 e1)

    Every rank must call it alike. Experts travel in rounds of a bounded size, so that
    the new parameter and one round's buffers are all that is held beside the old one.

    Args:
        parameter: one expert a row, in the old placement's slots; of the same trailing
            shape and dtype on every rank.
        moves: from the old placement to the new one.

    Returns:
        One expert a row, in the new placement's slots, evaluated. The parameter
        itself where nothing of this rank changes.
    """
    rank, kept = comm.rank, moves.kept[comm.rank]
    made = _kept_rows(parameter, kept)
    row_bytes = parameter.dtype.size * int(np.prod(parameter.shape[1:]))
    if moves.transfers and row_bytes:
        size = max(1, round_bytes // row_bytes)
        for first in range(0, moves.most_of_a_pair, size):
            chunk = slice(first, first + size)
            sent = [moves.pair(rank, peer)[chunk] for peer in range(comm.size)]
            taken = [moves.pair(peer, rank)[chunk] for peer in range(comm.size)]
            rows = [t.source_slot for of_peer in sent for t in of_peer]
            slots = [t.target_slot for of_peer in taken for t in of_peer]
            received = comm.all_to_all_v(
                _rows(parameter, rows), list(map(len, sent)), list(map(len, taken))
            )
            if slots:
                made[mx.array(slots)] = received
            # sync: the buffers of a round are freed before the next one starts, and
            # no rank is left waiting for one that does not use what it received.
            mx.eval(received, made)
            del received
    return made


def _kept_rows(parameter: mx.array, kept: tuple[int, ...]) -> mx.array:
    """The rows that stay, where the new placement has them; the others are anything."""
    if kept == tuple(range(parameter.shape[0])):
        return parameter
    if parameter.shape[0] == 0:
        return mx.zeros((len(kept), *parameter.shape[1:]), parameter.dtype)
    return _rows(parameter, [max(slot, 0) for slot in kept])


def _rows(parameter: mx.array, rows: list[int]) -> mx.array:
    if not rows:
        return parameter[:0]
    return mx.take(parameter, mx.array(rows), axis=0)
