"""Chunks of rows: taken out of an array, padded, joined.

Rows are taken by their numbers, and not cut out and joined: MLX runs collectives in
an order that follows from the graph, so the graph must be alike on all ranks, whatever
the counts. (A slice of everything, for one, leaves no trace in it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import numpy as np
from jaxtyping import Shaped


def take(
    rows: Shaped[mx.array, "n ..."], starts: Sequence[int], counts: Sequence[int]
) -> Shaped[mx.array, "m ..."]:
    """The chunks that start at these rows, joined."""
    ids = [np.arange(start, start + count) for start, count in zip(starts, counts)]
    return rows[mx.array(np.concatenate(ids).astype(np.int32))]


def take_padded(
    rows: Shaped[mx.array, "n ..."],
    starts: Sequence[int],
    counts: Sequence[int],
    width: int,
) -> Shaped[mx.array, "m ..."]:
    """The chunks that start at these rows, each padded to `width` rows, joined."""
    zero = mx.zeros((1, *rows.shape[1:]), dtype=rows.dtype)
    ids = np.full((len(starts), width), rows.shape[0], dtype=np.int32)
    for chunk, start, count in zip(ids, starts, counts):
        chunk[:count] = np.arange(start, start + count)
    return mx.concatenate([rows, zero])[mx.array(ids.reshape(-1))]


def split(rows: Shaped[mx.array, "n ..."], counts: Sequence[int]) -> list[mx.array]:
    """Rows cut into chunks of these sizes, where nothing has to be lazy."""
    return list(mx.split(rows, list(accumulate(counts))[:-1]))
