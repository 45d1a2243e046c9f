"""One launching function for each kernel of metal/*.metal."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Float32, Int32, Shaped, UInt32

from mlx_ep.kernels.launch import LANE, POSITION, checked_width
from mlx_ep.kernels.launch import MIN_WIDTH as MIN_WIDTH
from mlx_ep.kernels.loader import kernel
from mlx_ep.kernels.metal_experts import expert_down as expert_down
from mlx_ep.kernels.metal_experts import expert_glu as expert_glu
from mlx_ep.kernels.records import (
    FORMAT_VALUES,
    ReplicaTables,
    RouteTables,
    RowFormat,
    format_words,
)

MAX_RANKS = 32  # the ranks of a token are the bits of a word
MAX_CHOICE_RANKS = 8  # a lane has 2^P / 32 sets of ranks
MAX_CHOICE_EXPERTS = 1024  # their slots are in threadgroup memory
SEGMENT_BYTES = 4 * 32 * 16  # of a row, that one SIMD group copies or sums


def choose_replicas(
    expert_ids: Int32[mx.array, "T K"], tables: ReplicaTables
) -> Int32[mx.array, "T K"]:
    """The slot that serves each routed expert: the busiest rank reads the fewest.

    The choice of `mlx_ep.placement.ReplicaChoice.experts`, for ranks of one speed; no
    host sync.

    Args:
        expert_ids: of all tokens that are computed together; -1 is "no expert".
        tables: the copies of the experts, on at most 8 ranks.

    Raises:
        ValueError: there are more than 8 ranks or 1024 experts.
    """
    num_ranks, num_experts = tables.slots.shape
    if num_ranks > MAX_CHOICE_RANKS or num_experts > MAX_CHOICE_EXPERTS:
        raise ValueError(
            f"The choice's kernel takes at most {MAX_CHOICE_RANKS} ranks and "
            f"{MAX_CHOICE_EXPERTS} experts; got {num_ranks} and {num_experts}."
        )
    if not expert_ids.size:
        return expert_ids
    inputs = ("expert_ids", *tables._fields)
    body = (
        "threadgroup int slot_of[32 * WORDS];\n"
        f"choose_replicas<P, WORDS>({', '.join(inputs)}, served, slot_of, "
        "expert_ids_shape[0] * expert_ids_shape[1], order_shape[0], "
        f"class_masks_shape[0], {LANE});"
    )
    (served,) = kernel("choose_replicas", "", inputs, ("served",), body)(
        inputs=[expert_ids, *tables],
        output_shapes=[expert_ids.shape],
        output_dtypes=[mx.int32],
        template=[("P", num_ranks), ("WORDS", -(-num_experts // 32))],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return served


def route_plan(
    expert_ids: Int32[mx.array, "T K"],
    expert_ranks: Int32[mx.array, "E R"],
    expert_slots: Int32[mx.array, "E R"],
    *,
    num_ranks: int,
    num_slots: int,
) -> RouteTables:
    """Counts, offsets and stable positions of pairs and rows; no host sync.

    Args:
        expert_ids: the experts of each token; -1 is "no expert".
        expert_ranks: the ranks of each expert's replicas, 0..P-1. Token t uses
            replica ``t % R`` of every expert; one with fewer repeats them.
        expert_slots: the slots of the replicas in the group, 0..S-1, all ranks'
            slots counted through.
        num_ranks: P, at most 32.
        num_slots: S.

    Raises:
        ValueError: num_ranks is above 32.
    """
    if num_ranks > MAX_RANKS:
        raise ValueError(f"The plan's kernel takes at most 32 ranks; got {num_ranks}.")
    if not expert_ids.size:
        return RouteTables.of_nothing(expert_ids.shape, num_slots, num_ranks)
    shapes = RouteTables.shapes(expert_ids.shape, num_slots, num_ranks)
    inputs = ("expert_ids", "expert_ranks", "expert_slots")
    body = (
        f"route_plan({', '.join((*inputs, *shapes))}, expert_ids_shape[0], "
        f"expert_ids_shape[1], expert_ranks_shape[1], NUM_SLOTS, NUM_RANKS, "
        f"expert_ids_shape[0] * min(expert_ids_shape[1], NUM_RANKS), {LANE}, "
        f"{POSITION});"
    )
    num_threads = 32 * (num_slots + num_ranks)
    outputs = kernel("route_plan", "", inputs, tuple(shapes), body)(
        inputs=[expert_ids, expert_ranks, expert_slots],
        output_shapes=list(shapes.values()),
        output_dtypes=[mx.int32] * len(shapes),
        template=[("NUM_SLOTS", num_slots), ("NUM_RANKS", num_ranks)],
        grid=(num_threads, 1, 1),
        threadgroup=(min(128, num_threads), 1, 1),
    )
    return RouteTables(*outputs)


def pack_rows(
    x: Shaped[mx.array, "T D"],
    row_tokens: Int32[mx.array, " M"],
    count: Int32[mx.array, " 1"],
) -> Shaped[mx.array, "M D"]:
    """The token of each row: ``out[m] = x[row_tokens[m]]`` for ``m < count``.

    Rows from ``count`` on hold anything.

    Args:
        x: the tokens, numbers or words of them.
        row_tokens: the token of each row, as in `RouteTables`.
        count: rows to pack, at most M; on the device.

    Raises:
        ValueError: D is below 8.
    """
    shape = (row_tokens.shape[0], checked_width(x.shape[1]))
    if not x.size or not row_tokens.size:
        return mx.zeros(shape, x.dtype)
    body = f"pack_rows(x, row_tokens, count, packed, x_shape[1], {LANE}, {POSITION});"
    inputs = ("x", "row_tokens", "count")
    (packed,) = kernel("pack_rows", "", inputs, ("packed",), body)(
        inputs=[x, row_tokens, count],
        output_shapes=[shape],
        output_dtypes=[x.dtype],
        **_rows_of_segments(*shape, x.dtype),
    )
    return packed


def unpack_sum(
    rows: Float[mx.array, "M D"],
    row_ids: Int32[mx.array, "T C"],
    gates: Float32[mx.array, "T C"],
    local: Float[mx.array, "L D"] | None = None,
    *,
    dtype: mx.Dtype | None = None,
) -> Float[mx.array, "T D"]:
    """``out[t] = sum_c gates[t, c] * both[row_ids[t, c]]``, c ascending.

    `both` is `rows` and behind them `local`. Sums are float32 and are rounded once, to
    `dtype`; sums that are added to others later must not be, and stay float32.

    Args:
        rows: what came back for the tokens.
        row_ids: the rows of each token, 0..M+L-1; -1 is "none".
        gates: the weight of each of them.
        local: rows that did not travel, in a dtype of their own.
        dtype: of the result; default: that of `rows`.

    Raises:
        ValueError: D is below 8.
    """
    shape = (row_ids.shape[0], checked_width(rows.shape[1]))
    dtype = dtype or rows.dtype
    if not rows.shape[0] and local is not None:  # then the ids are those of `local`
        rows, local = local, None
    if not rows.size or not row_ids.size:
        return mx.zeros(shape, dtype)
    arrays = {"rows": rows, "row_ids": row_ids, "gates": gates}
    if local is not None and local.size:
        arrays["local"] = local
    body = (
        f"unpack_sum(rows, {'local' if 'local' in arrays else 'rows'}, row_ids, gates, "
        "out, rows_shape[0], rows_shape[1], row_ids_shape[1], "
        f"{LANE}, {POSITION});"
    )
    variant = "_local" if "local" in arrays else ""
    (out,) = kernel("unpack_sum", variant, tuple(arrays), ("out",), body)(
        inputs=list(arrays.values()),
        output_shapes=[shape],
        output_dtypes=[dtype],
        **_rows_of_segments(*shape, rows.dtype),
    )
    return out


def _rows_of_segments(num_rows: int, width: int, dtype: mx.Dtype) -> dict[str, Any]:
    """One SIMD group for every segment of every row; four of them a threadgroup."""
    segments = -(-width * dtype.size // SEGMENT_BYTES)
    return {"grid": (32 * segments, num_rows, 1), "threadgroup": (32, 4, 1)}


def quantize_rows(
    x: Float[mx.array, "M D"], form: RowFormat
) -> UInt32[mx.array, "M W"]:
    """Rows in 8 bits a value, with their scales; see `format_words` for the layout.

    Args:
        x: rows in float32, float16 or bfloat16.
        form: in which they travel.

    Raises:
        ValueError: D is below 8.
    """
    num_rows, width = x.shape
    shape = (num_rows, format_words(checked_width(width)))
    if not num_rows:
        return mx.zeros(shape, mx.uint32)
    body = f"quantize_rows<FORM>(x, words, x_shape[1], {LANE}, {POSITION});"
    (words,) = kernel("quantize_rows", "", ("x",), ("words",), body)(
        inputs=[x],
        output_shapes=[shape],
        output_dtypes=[mx.uint32],
        template=[("FORM", _FORMS[form])],
        **_rows_of_groups(num_rows, width),
    )
    return words


def dequantize_rows(
    words: UInt32[mx.array, "M W"], form: RowFormat, width: int, dtype: mx.Dtype
) -> Float[mx.array, "M D"]:
    """The rows that `quantize_rows` made its argument of, rounded once to `dtype`.

    float16 takes its largest number, 65504, where a code was rounded up from it.

    Args:
        words: rows in the form.
        form: that `quantize_rows` was given.
        width: D.
        dtype: of the result.

    Raises:
        ValueError: D is below 8, or is not that of rows of so many words.
    """
    num_rows, num_words = words.shape
    if num_words != format_words(checked_width(width)):
        raise ValueError(
            f"Rows of {width} values must have {format_words(width)} words; got "
            f"{num_words}."
        )
    if not num_rows:
        return mx.zeros((0, width), dtype)
    body = f"dequantize_rows<FORM>(words, widths, out, {LANE}, {POSITION});"
    (out,) = kernel("dequantize_rows", "", ("words", "widths"), ("out",), body)(
        inputs=[words, mx.array([width], mx.int32)],
        output_shapes=[(num_rows, width)],
        output_dtypes=[dtype],
        template=[("FORM", _FORMS[form])],
        **_rows_of_groups(num_rows, width),
    )
    return out


_FORMS: dict[RowFormat, int] = {"int8": 0, "mxfp8": 1}


def _rows_of_groups(num_rows: int, width: int) -> dict[str, Any]:
    """One SIMD group for every 128 values of every row; four of them a threadgroup."""
    groups = -(-width // FORMAT_VALUES)
    return {"grid": (32 * groups, num_rows, 1), "threadgroup": (32, 4, 1)}
