"""Gate-weighted sums in a fixed order (pure, no communication)."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from jaxtyping import Float, Float32, Int32


def with_zero_row(outputs: Float[mx.array, "N D"]) -> Float[mx.array, "N+1 D"]:
    """The outputs and one row of zeros behind them, for an index that says "none"."""
    zero = mx.zeros((1, outputs.shape[1]), outputs.dtype)
    return mx.concatenate([outputs, zero])


def weighted_sum(
    outputs: Float[mx.array, "N D"],
    pair_ids: Int32[mx.array, "M C"],
    gates: Float32[mx.array, "M C"],
) -> Float32[mx.array, "M D"]:
    """``sum_c gates[m, c] * outputs[pair_ids[m, c]]``, in float32, c ascending.

    Args:
        outputs: what the experts returned, one line per (row, slot) pair.
        pair_ids: the pairs of each row; -1 is "none" and must have gate 0.
        gates: the weight of each of those pairs.
    """
    # As an index, -1 is the last row.
    terms = with_zero_row(outputs)[pair_ids].astype(mx.float32)
    return (terms * gates[..., None]).sum(axis=1)


def weighted_slots(
    outputs: Float[mx.array, "... K D"], gates: Float32[mx.array, "... K"]
) -> Float32[mx.array, "... D"]:
    """``sum_k gates[..., k] * outputs[..., k]``, in float32, k ascending."""
    return (outputs.astype(mx.float32) * gates[..., None]).sum(axis=-2)


@partial(mx.compile, shapeless=True)
def add_to(
    total: Float[mx.array, ...], sums: Float[mx.array, ...]
) -> Float32[mx.array, ...]:
    """The total with another rank's sums, in float32.

    Either may be rounded: no copy of it in float32 is written and read again, which on
    a CPU host takes as long as the addition itself.
    """
    return total.astype(mx.float32) + sums.astype(mx.float32)
