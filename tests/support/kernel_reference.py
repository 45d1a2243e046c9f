"""What the kernels compute, in float64 NumPy loops."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_ep.kernels import Activation, Projection, RouteTables

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def route_plan(
    expert_ids: np.ndarray,
    expert_ranks: np.ndarray,
    expert_slots: np.ndarray,
    num_ranks: int,
    num_slots: int,
) -> dict[str, list]:
    """The fields of a RouteTables, by sorting lists."""
    num_tokens, per_token = expert_ids.shape
    pairs = [
        (int(expert_slots[e]), t, k)
        for t in range(num_tokens)
        for k, e in enumerate(expert_ids[t])
        if e >= 0
    ]
    visits = {
        (int(expert_ranks[e]), t)
        for t in range(num_tokens)
        for e in expert_ids[t]
        if e >= 0
    }
    rows = sorted(visits)
    positions = np.full(expert_ids.shape, -1)
    for place, (_, t, k) in enumerate(sorted(pairs)):
        positions[t, k] = place
    token_rows = np.full((num_tokens, num_ranks), -1)
    for row, (rank, t) in enumerate(rows):
        token_rows[t, rank] = row
    slot_counts = [sum(p[0] == s for p in pairs) for s in range(num_slots)]
    rank_counts = [sum(r[0] == rank for r in rows) for rank in range(num_ranks)]
    capacity = num_tokens * min(per_token, num_ranks)
    return {
        "slot_counts": slot_counts,
        "slot_offsets": [0, *np.cumsum(slot_counts).tolist()],
        "positions": positions.tolist(),
        "rank_counts": rank_counts,
        "rank_offsets": [0, *np.cumsum(rank_counts).tolist()],
        "row_tokens": [t for _, t in rows] + [-1] * (capacity - len(rows)),
        "token_rows": token_rows.tolist(),
    }


def as_lists(plan: RouteTables) -> dict[str, list]:
    return {name: np.array(x).tolist() for name, x in plan._asdict().items()}


def unpack_sum(rows: mx.array, row_ids: np.ndarray, gates: mx.array) -> np.ndarray:
    values, weights = as_float64(rows), as_float64(gates)
    out = np.zeros((row_ids.shape[0], rows.shape[1]))
    for t, c in np.argwhere(row_ids >= 0):
        out[t] += weights[t, c] * values[row_ids[t, c]]
    return out


def unpacked(projection: Projection) -> np.ndarray:
    """The weight, ``[L, rows, columns]``."""
    if projection.mode == "dense":
        return as_float64(projection.weight)
    shifts = np.arange(0, 32, projection.bits, dtype=np.uint32)
    words = np.array(projection.weight)[..., None] >> shifts
    codes = (words & (2**projection.bits - 1)).reshape(*words.shape[:2], -1)
    assert projection.scales is not None
    groups = np.repeat(as_float64(projection.scales), projection.group_size, axis=-1)
    if projection.mode == "mxfp4":
        return FP4[codes & 7] * np.where(codes & 8, -1, 1) * 2.0 ** (groups - 127)
    assert projection.offsets is not None
    offsets = np.repeat(as_float64(projection.offsets), projection.group_size, axis=-1)
    return codes * groups + offsets


def project(x: np.ndarray, slot: int, projection: Projection) -> np.ndarray:
    out = unpacked(projection)[slot] @ x
    return out if projection.bias is None else out + as_float64(projection.bias)[slot]


def expert_glu(
    x: mx.array,
    slot_ids: np.ndarray,
    gate: Projection,
    up: Projection,
    activation: Activation,
) -> np.ndarray:
    """Zeros where the slot is foreign."""
    hidden = np.zeros((*slot_ids.shape, gate.rows))
    for t, k in np.argwhere(slot_ids >= 0):
        vector, slot = as_float64(x)[t], slot_ids[t, k]
        g, u = project(vector, slot, gate), project(vector, slot, up)
        if activation == "swiglu":
            hidden[t, k] = g / (1 + np.exp(-g)) * u
        else:
            g, u = np.minimum(g, 7), np.clip(u, -7, 7)
            hidden[t, k] = g / (1 + np.exp(-1.702 * g)) * (u + 1)
    return hidden


def expert_down(
    hidden: mx.array, slot_ids: np.ndarray, gates: mx.array, down: Projection
) -> np.ndarray:
    out = np.zeros((slot_ids.shape[0], down.rows))
    for t, k in np.argwhere(slot_ids >= 0):
        y = project(as_float64(hidden[t, k]), slot_ids[t, k], down)
        out[t] += as_float64(gates)[t, k] * y
    return out


# The 127 magnitudes of e4m3 by their codes; 0x7f is NaN.
E4M3 = np.array(
    [c * 2.0**-9 for c in range(8)]
    + [(1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(8, 127)]
)


def rounded_rows(x: mx.array, form: str) -> np.ndarray:
    """What is left of rows in a form of 8 bits a value, by looking for it; finite x."""
    rows = as_float64(x)
    out = np.zeros_like(rows)
    group = {"int8": 128, "mxfp8": 32}[form]
    for row, values in enumerate(rows):
        for start in range(0, len(values), group):
            part = values[start : start + group]
            largest = np.abs(part).max()
            if largest < 2.0**-100:
                continue
            if form == "int8":
                step = float(np.float32(largest) / np.float32(127))
                out[row, start : start + group] = np.rint(part / step) * step
                continue
            exponent = -127
            while largest / 2.0**exponent > 448:
                exponent += 1
            for i, value in enumerate(part):
                distance = np.abs(E4M3 - abs(value) / 2.0**exponent)
                nearest = np.flatnonzero(distance == distance.min())
                code = next(c for c in nearest if len(nearest) == 1 or c % 2 == 0)
                out[row, start + i] = np.copysign(E4M3[code], value) * 2.0**exponent
    return out


def calc_diff(x: mx.array, y: mx.array) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>), as DeepGEMM and DeepEP compare."""
    a, b = as_float64(x), as_float64(y)
    return float(1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum()))
