"""The launching functions of the decode experts' kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Float32, Int32

from mlx_ep.kernels.launch import THREADS, checked_width
from mlx_ep.kernels.loader import kernel
from mlx_ep.kernels.records import Activation, Projection

MAX_CHUNK = 8  # tokens that share the reading of a slot's weights
MAX_SIMDS = 8  # SIMD groups of a threadgroup of the expert kernels
DOWN_ROWS = 4
MODES = {"dense": 0, "affine": 1, "mxfp4": 2}
ACTIVATIONS = {"swiglu": 0, "clamped_swiglu": 1}


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
    _check_columns(gate, checked_width(x.shape[1]))
    num_tokens, per_token = slot_ids.shape
    shape = (num_tokens, per_token, checked_width(gate.rows))
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
    _check_columns(down, checked_width(hidden.shape[2]))
    num_tokens, per_token = slot_ids.shape
    shape = (num_tokens, checked_width(down.rows))
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


def _check_columns(projection: Projection, width: int) -> None:
    # A kernel that is given the wrong width reads whatever lies behind the weights.
    if projection.columns != width:
        raise ValueError(
            f"The projection takes vectors of {projection.columns}; got {width}."
        )
