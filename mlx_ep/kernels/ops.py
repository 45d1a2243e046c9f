"""The kernels in plain mx ops: what they compute, and the path without Metal."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from jaxtyping import Float, Float32, Int32, Shaped, UInt32

from mlx_ep.kernels.records import (
    FORMAT_VALUES,
    Activation,
    Projection,
    ReplicaTables,
    RouteTables,
    RowFormat,
    format_words,
)

# Bits of float32 magnitudes: 2^-100, below which a group is zero, and infinity.
SMALLEST, INFINITE = 27 << 23, 255 << 23
CLAMP_LIMIT = 7.0  # of gpt-oss
CLAMP_SLOPE = 1.702


def choose_replicas(
    expert_ids: Int32[mx.array, "T K"], tables: ReplicaTables
) -> Int32[mx.array, "T K"]:
    """The slot that serves each routed expert: the busiest rank reads the fewest.

    The choice of `mlx_ep.placement.ReplicaChoice.experts`, for ranks of one speed; no
    host sync.

    Args:
        expert_ids: of all tokens that are computed together; -1 is "no expert".
        tables: the copies of the experts, on at most 8 ranks.
    """
    order, class_masks, class_starts, slots = tables
    num_ranks, num_experts = slots.shape
    if not expert_ids.size:
        return expert_ids
    used = (order[:, None] == expert_ids.reshape(-1)).any(axis=1)  # by place
    before = mx.concatenate(
        [mx.zeros((1,), mx.int32), mx.cumsum(used.astype(mx.int32))]
    )
    starts = before[class_starts]
    counts = starts[1:] - starts[:-1]  # [C]
    sets = mx.arange(1 << num_ranks)
    bits = (sets[:, None] >> mx.arange(num_ranks)) & 1  # [2^P P]
    sizes = bits.sum(axis=1).astype(mx.int32)
    holds_all = (sets & class_masks[:, None]) == class_masks[:, None]  # [C 2^P]
    need = mx.where(holds_all, counts[:, None], 0).sum(axis=0).astype(mx.int32)
    most = ((need + sizes - 1) // mx.maximum(sizes, 1))[1:].max()
    slack = most * sizes - need
    plenty, ends = mx.array(1 << 30), []
    for index in range(class_masks.shape[0]):
        done, mask = mx.array(0), class_masks[index]
        for rank in range(num_ranks):
            cut = (bits[:, rank] == 1) & ~holds_all[index]
            fits = mx.where(cut, slack, plenty).min()
            # Where it is the last holder there is room for all that are left.
            taken = mx.minimum(counts[index] - done, fits)
            taken = mx.where((mask >> rank) & 1 == 1, taken, 0)
            slack = slack - mx.where(cut, taken, 0)
            done = done + taken
            ends.append(done)
    ends_of = mx.stack(ends).reshape(-1, num_ranks)  # [C P]
    places = mx.arange(num_experts)
    class_of = (places[:, None] >= class_starts[1:]).sum(axis=1)
    number = before[:-1] - starts[class_of]
    ranks = (number[:, None] >= ends_of[class_of]).sum(axis=1)
    slot_of = mx.zeros((num_experts,), mx.int32)
    slot_of[order] = slots[mx.minimum(ranks, num_ranks - 1), order]
    served = slot_of[mx.maximum(expert_ids, 0)]
    return mx.where(expert_ids < 0, -1, served).astype(mx.int32)


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
    """
    num_tokens, per_token = expert_ids.shape
    num_pairs = num_tokens * per_token
    if not num_pairs:
        return RouteTables.of_nothing(expert_ids.shape, num_slots, num_ranks)
    none = expert_ids < 0
    replica = mx.arange(num_tokens)[:, None] % expert_ranks.shape[1]
    slots = mx.where(none, num_slots, expert_slots[expert_ids, replica]).reshape(-1)
    slot_counts = mx.zeros((num_slots + 1,), mx.int32).at[slots].add(1)[:-1]
    # Distinct keys, so that the sort keeps pairs of one slot in their order.
    order = mx.argsort(slots * num_pairs + mx.arange(num_pairs))
    ranked = mx.zeros((num_pairs,), mx.int32)
    ranked[order] = mx.arange(num_pairs).astype(mx.int32)
    positions = mx.where(none, -1, ranked.reshape(expert_ids.shape))

    ranks = mx.where(none, num_ranks, expert_ranks[expert_ids, replica])
    on_rank = (ranks[..., None] == mx.arange(num_ranks)).any(axis=1)  # [T P]
    rank_counts = on_rank.sum(axis=0).astype(mx.int32)
    rank_offsets = _offsets(rank_counts)
    before = mx.cumsum(on_rank, axis=0) - on_rank
    token_rows = mx.where(on_rank, rank_offsets[:-1] + before, -1)
    # One row too many: the pairs that make none are all written there, and cut off.
    capacity = num_tokens * min(per_token, num_ranks)
    tokens = mx.broadcast_to(mx.arange(num_tokens)[:, None], on_rank.shape)
    row_tokens = mx.full((capacity + 1,), -1, dtype=mx.int32)
    row_tokens[mx.where(on_rank, token_rows, capacity)] = tokens.astype(mx.int32)
    return RouteTables(
        slot_counts,
        _offsets(slot_counts),
        positions.astype(mx.int32),
        rank_counts,
        rank_offsets,
        row_tokens[:capacity],
        token_rows.astype(mx.int32),
    )


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
    """
    if not x.shape[0]:
        return mx.zeros((row_tokens.shape[0], x.shape[1]), x.dtype)
    return x[mx.maximum(row_tokens, 0)]


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
    """
    dtype = dtype or rows.dtype
    if local is not None:
        both = [part.astype(mx.float32) for part in (rows, local)]
        rows = mx.concatenate(both)
    out = mx.zeros((row_ids.shape[0], rows.shape[1]), mx.float32)
    if not rows.shape[0]:
        return out.astype(dtype)
    for choice in range(row_ids.shape[1]):
        ids = row_ids[:, choice]
        term = gates[:, choice, None] * rows[mx.maximum(ids, 0)].astype(mx.float32)
        out = out + mx.where(ids[:, None] >= 0, term, 0.0)
    return out.astype(dtype)


def quantize_rows(
    x: Float[mx.array, "M D"], form: RowFormat
) -> UInt32[mx.array, "M W"]:
    """Rows in 8 bits a value, with their scales; see `format_words` for the layout.

    Args:
        x: rows in float32, float16 or bfloat16.
        form: in which they travel.
    """
    num_rows, width = x.shape
    if not num_rows:
        return mx.zeros((0, format_words(width)), mx.uint32)
    segments = -(-width // FORMAT_VALUES)
    padded = mx.pad(x, [(0, 0), (0, segments * FORMAT_VALUES - width)])
    group = FORMAT_VALUES if form == "int8" else FORMAT_VALUES // 4
    values = padded.astype(mx.float32).reshape(num_rows, -1, group)
    # As bits, NaN and infinity are above every number.
    largest = (values.view(mx.uint32) & 0x7FFFFFFF).max(axis=2, keepdims=True)
    is_finite = largest < INFINITE
    has_codes = is_finite & (largest >= SMALLEST)
    if form == "int8":
        steps = mx.where(has_codes, largest.view(mx.float32) / 127, 0.0)
        codes = _int8_codes(values, steps, has_codes)
        scales = mx.where(is_finite, steps, float("nan")).view(mx.uint32)
    else:
        # The smallest power of two that leaves nothing above 448, 1.75 * 2^8.
        exponents = ((largest + 0x1FFFFF) >> 23).astype(mx.int32) - 8
        exponents = mx.where(has_codes, exponents, mx.where(is_finite, 0, 255))
        inverse = mx.where(has_codes, (254 - exponents) << 23, 0).view(mx.float32)
        codes = mx.to_fp8(_products(has_codes, values, inverse))
        scales = exponents.astype(mx.uint8).reshape(num_rows, -1).view(mx.uint32)
    words = codes.reshape(num_rows, -1).view(mx.uint32)[:, : -(-width // 4)]
    return mx.concatenate([words, scales.reshape(num_rows, segments)], axis=1)


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
    """
    num_rows, segments = words.shape[0], -(-width // FORMAT_VALUES)
    if not num_rows:
        return mx.zeros((0, width), dtype)
    codes, scale_words = mx.split(words, [-(-width // 4)], axis=1)
    missing = segments * FORMAT_VALUES // 4 - codes.shape[1]
    codes = mx.contiguous(mx.pad(codes, [(0, 0), (0, missing)]))
    scale_words = mx.contiguous(scale_words)
    if form == "int8":
        values, scales = (
            codes.view(mx.int8).astype(mx.float32),
            scale_words.view(mx.float32),
        )
    else:
        values = mx.from_fp8(codes.view(mx.uint8), mx.float32)
        exponents = scale_words.view(mx.uint8).astype(mx.int32)
        scales = (exponents << 23).view(mx.float32)
        scales = mx.where(exponents == 255, float("nan"), scales)
    grouped = values.reshape(num_rows, scales.shape[1], -1)
    if dtype == mx.float16:
        rows = grouped * scales[..., None]
        rows = mx.where(mx.abs(rows) > 65504, mx.sign(rows) * 65504, rows).astype(dtype)
    else:
        rows = _scaled(grouped, scales[..., None], mx.zeros((), dtype))
    return rows.reshape(num_rows, -1)[:, :width]


# One pass over the values each, where MLX's operations one by one are five.


@partial(mx.compile, shapeless=True)
def _int8_codes(values: mx.array, steps: mx.array, has_codes: mx.array) -> mx.array:
    codes = mx.round(values / mx.where(has_codes, steps, 1.0))
    return mx.where(has_codes, codes, 0.0).astype(mx.int8)


@partial(mx.compile, shapeless=True)
def _products(has_codes: mx.array, values: mx.array, inverse: mx.array) -> mx.array:
    return mx.where(has_codes, values * inverse, 0.0)


@partial(mx.compile, shapeless=True)
def _scaled(values: mx.array, scales: mx.array, like: mx.array) -> mx.array:
    return (values * scales).astype(like.dtype)


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
    """
    if not gate.num_slots:
        return mx.zeros((*slot_ids.shape, gate.rows), mx.float32)
    gated = _project(x[:, None], slot_ids, gate)
    linear = _project(x[:, None], slot_ids, up)
    if activation == "swiglu":
        return gated * mx.sigmoid(gated) * linear
    gated = mx.minimum(gated, CLAMP_LIMIT)
    linear = mx.clip(linear, -CLAMP_LIMIT, CLAMP_LIMIT)
    return gated * mx.sigmoid(CLAMP_SLOPE * gated) * (linear + 1.0)


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
    """
    out = mx.zeros((slot_ids.shape[0], down.rows), mx.float32)
    if not down.num_slots:
        return out
    own = slot_ids >= 0
    # Zeros for what nobody computed: it may be NaN, which no gate would cancel.
    hidden = mx.where(own[..., None], hidden, 0.0)
    outputs = _project(hidden, slot_ids, down)
    terms = mx.where(own[..., None], gates[..., None] * outputs, 0.0)
    for k in range(slot_ids.shape[1]):
        out = out + terms[:, k]
    return out


def _project(
    x: mx.array, slot_ids: mx.array, projection: Projection
) -> Float32[mx.array, "T K rows"]:
    """``projection[slot] @ x + bias`` of [T, K or 1, columns] inputs, in float32.

    MLX's CPU quantized product accumulates in the dtype of x, hence float32. This
    converts all scales, and dense weights whole: right, not fast.
    """
    slots = mx.maximum(slot_ids, 0)
    vectors = x.astype(mx.float32)[:, :, None]
    if projection.mode == "dense":
        weight = projection.weight.astype(mx.float32).swapaxes(1, 2)
        out = mx.gather_mm(vectors, weight, rhs_indices=slots)
    else:
        scales, offsets = projection.scales, projection.offsets
        assert scales is not None
        out = mx.gather_qmm(
            vectors,
            projection.weight,
            scales.astype(mx.float32) if projection.mode == "affine" else scales,
            offsets.astype(mx.float32) if offsets is not None else None,
            rhs_indices=slots,
            transpose=True,
            group_size=projection.group_size,
            bits=projection.bits,
            mode=projection.mode,
        )
    out = out.squeeze(-2)
    if projection.bias is not None:
        out = out + projection.bias[slots].astype(mx.float32)
    return out


def _offsets(counts: mx.array) -> mx.array:
    """Exclusive prefix sums, and the total at the end."""
    return mx.concatenate([mx.zeros((1,), mx.int32), mx.cumsum(counts)])
