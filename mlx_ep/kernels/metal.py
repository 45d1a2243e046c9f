"""One launching function for each kernel of metal/*.metal."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Float32, Int32

from mlx_ep.kernels.loader import kernel
from mlx_ep.kernels.records import Activation, Projection, ReplicaTables, RouteTables

MAX_RANKS = 32  # the ranks of a token are the bits of a word
# MLX passes arrays of fewer elements in another address space.
MIN_WIDTH = 8
MAX_CHUNK = 8  # tokens that share the reading of a slot's weights
MAX_CHOICE_RANKS = 8  # a lane has 2^P / 32 sets of ranks
MAX_CHOICE_EXPERTS = 1024  # their slots are in threadgroup memory
MAX_SIMDS = 8  # SIMD groups of a threadgroup of the expert kernels
DOWN_ROWS = 4
SEGMENT_BYTES = 4 * 32 * 16  # of a row, that one SIMD group copies or sums
MODES = {"dense": 0, "affine": 1, "mxfp4": 2}
ACTIVATIONS = {"swiglu": 0, "clamped_swiglu": 1}

LANE = "thread_index_in_simdgroup"
POSITION = "thread_position_in_grid"
THREADS = (
    f"{LANE}, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, "
    "threadgroup_position_in_grid"
)


# ---------------------------------------------------------------- routing and movement


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
    x: Float[mx.array, "T D"],
    row_tokens: Int32[mx.array, " M"],
    count: Int32[mx.array, " 1"],
) -> Float[mx.array, "M D"]:
    """The token of each row: ``out[m] = x[row_tokens[m]]`` for ``m < count``.

    Rows from ``count`` on hold anything.

    Args:
        x: the tokens.
        row_tokens: the token of each row, as in `RouteTables`.
        count: rows to pack, at most M; on the device.

    Raises:
        ValueError: D is below 8.
    """
    shape = (row_tokens.shape[0], _checked_width(x.shape[1]))
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
    shape = (row_ids.shape[0], _checked_width(rows.shape[1]))
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


# ---------------------------------------------------------------- decode experts


def expert_glu(
    x: Float[mx.array, "T D"],
    slot_ids: Int32[mx.array, "T K"],
    gate: Projection,
    up: Projection,
    activation: Activation = "swiglu",
) -> Float32[mx.array, "T K F"]:
    """Gate and up projection and SwiGLU of each token's slots on this rank.

    Entries whose slot id is -1 hold anything. All arithmetic is float32.

    Args:
        x: the tokens.
        slot_ids: the slots of this rank that each token visits; -1 elsewhere.
        gate, up: ``[L, F, D]``, packed alike.
        activation: ``"swiglu"``, or ``"clamped_swiglu"`` as in gpt-oss.

    Raises:
        ValueError: D or F is below 8, gate and up are not packed alike, or they take
            vectors of another width.
    """
    if _packing(gate) != _packing(up):
        raise ValueError(
            "gate and up must be packed alike; got "
            f"{_packing(gate)} and {_packing(up)}."
        )
    _check_columns(gate, _checked_width(x.shape[1]))
    num_tokens, per_token = slot_ids.shape
    shape = (num_tokens, per_token, _checked_width(gate.rows))
    if not slot_ids.size or not gate.num_slots:
        return mx.zeros(shape, mx.float32)
    arrays = {"x": x, "slot_ids": slot_ids} | _parts("gate", gate) | _parts("up", up)
    body = (
        "threadgroup int memory[2 * TOKENS * K];\n"
        "expert_glu<MODE, BITS, GROUP, ACTIVATION, TOKENS, K>(x, slot_ids, "
        f"{_projection('gate', gate)}, {_projection('up', up)}, hidden, memory, "
        "slot_ids_shape[0] * K, gate_weight_shape[1], x_shape[1], "
        f"{THREADS});"
    )
    chunk = _chunk(num_tokens)
    (hidden,) = kernel("expert_glu", _variant(gate), tuple(arrays), ("hidden",), body)(
        inputs=list(arrays.values()),
        output_shapes=[shape],
        output_dtypes=[mx.float32],
        template=[
            *_format(gate),
            ("ACTIVATION", ACTIVATIONS[activation]),
            ("TOKENS", chunk),
            ("K", per_token),
        ],
        **_blocks_and_chunks(gate.rows, 4 if chunk == 1 else 2, chunk, slot_ids),
    )
    return hidden


def expert_down(
    hidden: Float32[mx.array, "T K F"],
    slot_ids: Int32[mx.array, "T K"],
    gates: Float32[mx.array, "T K"],
    down: Projection,
) -> Float32[mx.array, "T D"]:
    """Down projection and the gate-weighted sum over the slots of this rank.

    The sum is in the order of k; a token without a slot here gives zeros.

    Args:
        hidden: as `expert_glu` returns it.
        slot_ids: as in `expert_glu`.
        gates: the weight of each slot's output.
        down: ``[L, D, F]``.

    Raises:
        ValueError: D or F is below 8, or `down` takes vectors of another width.
    """
    _check_columns(down, _checked_width(hidden.shape[2]))
    num_tokens, per_token = slot_ids.shape
    shape = (num_tokens, _checked_width(down.rows))
    if not slot_ids.size or not down.num_slots:
        return mx.zeros(shape, mx.float32)
    arrays = {"hidden": hidden, "slot_ids": slot_ids, "gates": gates}
    arrays |= _parts("down", down)
    body = (
        "threadgroup int memory[2 * TOKENS * K];\n"
        f"threadgroup float products[TOKENS * K * {DOWN_ROWS}];\n"
        "expert_down<MODE, BITS, GROUP, TOKENS, K>(hidden, slot_ids, gates, "
        f"{_projection('down', down)}, out, memory, products, slot_ids_shape[0] * K, "
        f"down_weight_shape[1], hidden_shape[2], {THREADS});"
    )
    chunk = _chunk(num_tokens)
    (out,) = kernel("expert_down", _variant(down), tuple(arrays), ("out",), body)(
        inputs=list(arrays.values()),
        output_shapes=[shape],
        output_dtypes=[mx.float32],
        template=[*_format(down), ("TOKENS", chunk), ("K", per_token)],
        **_blocks_and_chunks(down.rows, DOWN_ROWS, chunk, slot_ids),
    )
    return out


def _chunk(num_tokens: int) -> int:
    """Tokens that one threadgroup serves: the next power of two, at most 8."""
    return min(MAX_CHUNK, 1 << (num_tokens - 1).bit_length())


def _blocks_and_chunks(
    rows: int, block: int, chunk: int, slot_ids: mx.array
) -> dict[str, Any]:
    """A threadgroup per block of rows and chunk of tokens, a SIMD group per pair."""
    num_tokens, per_token = slot_ids.shape
    simds = min(MAX_SIMDS, chunk * per_token)
    blocks, chunks = -(-rows // block), -(-num_tokens // chunk)
    return {"grid": (32 * blocks, simds, chunks), "threadgroup": (32, simds, 1)}


def _packing(projection: Projection) -> tuple[object, ...]:
    parts = (projection.weight, projection.scales, projection.bias)
    dtypes = tuple(None if part is None else part.dtype for part in parts)
    if projection.mode == "dense":
        return (projection.weight.shape, *dtypes)
    return (projection.weight.shape, *dtypes, projection.bits, projection.group_size)


def _format(projection: Projection) -> list[tuple[str, Any]]:
    """The template arguments that say how the weights are packed."""
    types = {"W": projection.weight, "S": projection.scales, "B": projection.bias}
    return [
        ("MODE", MODES[projection.mode]),
        ("BITS", projection.bits),
        ("GROUP", projection.group_size),
        # Any type will do for a part that is missing.
        *((k, mx.float32 if v is None else v.dtype) for k, v in types.items()),
    ]


def _variant(projection: Projection) -> str:
    """Names the set of inputs, which MLX does not make part of a kernel's name."""
    return f"_{projection.mode}" + ("" if projection.bias is None else "_bias")


def _parts(name: str, projection: Projection) -> dict[str, mx.array]:
    """The arrays that a projection has, by the names the kernel gives them."""
    parts = {
        f"{name}_weight": projection.weight,
        f"{name}_scales": projection.scales,
        f"{name}_offsets": projection.offsets,
        f"{name}_bias": projection.bias,
    }
    return {key: part for key, part in parts.items() if part is not None}


def _projection(name: str, projection: Projection) -> str:
    """The expression that makes a Projection of weights.h from the parts."""
    present = _parts(name, projection)
    fields = [f"{name}_{part}" for part in ("weight", "scales", "offsets", "bias")]
    values = ", ".join(key if key in present else "nullptr" for key in fields)
    return f"Projection<W, S, B>{{{values}}}"


def _checked_width(width: int) -> int:
    if width < MIN_WIDTH:
        raise ValueError(
            f"The kernels need a model and an expert width of at least {MIN_WIDTH}; "
            f"got {width}. Use mlx_ep.kernels.ops."
        )
    return width


def _check_columns(projection: Projection, width: int) -> None:
    # A kernel that is given the wrong width reads whatever lies behind the weights.
    if projection.columns != width:
        raise ValueError(
            f"The projection takes vectors of {projection.columns}; got {width}."
        )
