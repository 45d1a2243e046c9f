"""expert_glu and expert_down: the kernels and their twins against float64 loops."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.kernels import Activation, Projection, metal
from tests.support import host, kernel_reference
from tests.support.projections import PACKINGS, group_size, projection

packings = pytest.mark.parametrize("packing", PACKINGS)

# A slot is visited by one, several, all tokens, or none; a token by all, some, none.
SLOT_IDS = {
    1: [[2, -1, 0]],
    3: [[0, 1, 2], [-1, 0, 4], [-1, -1, -1]],
    8: [[3, 0, -1], [3, -1, 1], [-1, 3, -1], [3, 2, 1]] * 2,
    # The ninth token is alone in its chunk.
    9: [[0, -1, 1]] * 9,
}
NUM_SLOTS = 5
WITH_BIAS = {"float16", "affine4-128", "mxfp4"}
# By what they must divide by; more than the (at most) 512 that 32 lanes take at once,
# and no multiple of them.
COLUMNS = {1: 301, 32: 17 * 32, 64: 9 * 64, 128: 5 * 128}


def tokens(number: int, width: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((number, width), key=mx.random.key(number)).astype(dtype)


def int32(values: object) -> mx.array:
    return mx.array(np.array(values, np.int32))


def close(got: mx.array, expected: np.ndarray) -> bool:
    """As float32 sums of some hundred terms are, relative to the largest result."""
    error = np.abs(kernel_reference.as_float64(got) - expected).max()
    return bool(error <= 1e-5 * max(1.0, np.abs(expected).max()))


def check_glu(
    module: ModuleType,
    x: mx.array,
    slot_ids: list,
    gate: Projection,
    up: Projection,
    activation: Activation = "swiglu",
) -> None:
    ids = np.array(slot_ids, np.int32)
    got = module.expert_glu(x, mx.array(ids), gate, up, activation)
    assert got.shape == (*ids.shape, gate.rows) and got.dtype == mx.float32
    expected = kernel_reference.expert_glu(x, ids, gate, up, activation)
    assert close(mx.where(mx.array(ids >= 0)[..., None], got, 0.0), expected)


def check_down(module: ModuleType, slot_ids: list, down: Projection) -> None:
    ids = np.array(slot_ids, np.int32)
    own = mx.array(ids >= 0)[..., None]
    hidden = mx.random.normal((*ids.shape, down.columns), key=mx.random.key(3))
    gates = mx.random.uniform(shape=ids.shape, key=mx.random.key(4))
    # What expert_glu leaves where the slot is foreign must not matter.
    hidden = mx.where(own, hidden, float("nan"))
    got = module.expert_down(hidden, mx.array(ids), gates, down)
    assert got.shape == (ids.shape[0], down.rows) and got.dtype == mx.float32
    assert close(got, kernel_reference.expert_down(hidden, ids, gates, down))


# ------------------------------------------------------------------ packings and sizes


@packings
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_glu(module: ModuleType, packing: str, num_tokens: int) -> None:
    width, rows = COLUMNS[group_size(packing)], 19
    bias = packing in WITH_BIAS
    gate, up = (
        projection(packing, NUM_SLOTS, rows, width, bias=bias, seed=i) for i in (1, 2)
    )
    x = tokens(num_tokens, width, mx.bfloat16)
    check_glu(module, x, SLOT_IDS[num_tokens], gate, up)


@packings
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_down(module: ModuleType, packing: str, num_tokens: int) -> None:
    columns, rows = COLUMNS[group_size(packing)], 13
    bias = packing in WITH_BIAS
    down = projection(packing, NUM_SLOTS, rows, columns, bias=bias)
    check_down(module, SLOT_IDS[num_tokens], down)


@pytest.mark.parametrize("packing", ["bfloat16", "affine4-32", "mxfp4"])
@pytest.mark.parametrize("num_tokens", [1, 3, 9])
def test_bias_and_clamp(module: ModuleType, packing: str, num_tokens: int) -> None:
    """As in gpt-oss. Large inputs, so that the limits are reached."""
    width = COLUMNS[group_size(packing)]
    gate, up = (
        projection(packing, NUM_SLOTS, 10, width, bias=True, seed=i) for i in (1, 2)
    )
    x, ids = tokens(num_tokens, width) * 12, SLOT_IDS[num_tokens]
    assert (
        np.abs(
            kernel_reference.project(kernel_reference.as_float64(x)[0], 0, gate)
        ).max()
        > 7
    )
    check_glu(module, x, ids, gate, up, "clamped_swiglu")
    check_down(module, ids, projection(packing, NUM_SLOTS, 10, width, bias=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_dtypes_of_x(kernels: None, dtype: mx.Dtype) -> None:
    gate, up = (projection("affine4-64", 5, 8, 64, bias=False, seed=i) for i in (1, 2))
    check_glu(metal, tokens(1, 64, dtype), SLOT_IDS[1], gate, up)


@pytest.mark.parametrize("packing", ["float32", "affine4-64"])
def test_schedules(scheduled_kernels: None, packing: str) -> None:
    gate, up, down = (
        projection(packing, NUM_SLOTS, 64, 64, bias=True, seed=i) for i in range(3)
    )
    check_glu(metal, tokens(3, 64), SLOT_IDS[3], gate, up)
    check_down(metal, SLOT_IDS[3], down)


# ------------------------------------------------------------------ who visits what

ROUTINGS = {
    "all foreign": [[-1, -1]] * 3,
    "one slot for all": [[1, -1]] * 8,
    "more tokens than a chunk": [[0, 1], [1, 2]] * 10,
    "one choice": [[0], [-1], [2]],
    "more than 8 choices": [[0, 1, 2, -1, 3, 4, -1, -1, -1, -1, -1]],
    # Not what top-k gives, yet it must not go missing.
    "a slot twice": [[1, 1], [1, 1], [2, 1]] * 4,
    "33 pairs and more": [[k % 5 for k in range(t, t + 5)] for t in range(8)],
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(module: ModuleType, routing: str) -> None:
    ids = ROUTINGS[routing]
    gate, up, down = (
        projection("float32", NUM_SLOTS, 12, 12, bias=True, seed=i) for i in range(3)
    )
    check_glu(module, tokens(len(ids), 12), ids, gate, up)
    check_down(module, ids, down)


def test_nothing(module: ModuleType) -> None:
    """No tokens; no slots on this rank."""
    gate = projection("float32", 2, 8, 16, bias=False)
    none, no_ids = mx.zeros((0, 2)), int32(np.zeros((0, 2)))
    assert module.expert_glu(tokens(0, 16), no_ids, gate, gate).shape == (0, 2, 8)
    hidden = mx.zeros((0, 2, 16))
    assert module.expert_down(hidden, no_ids, none, gate).shape == (0, 8)
    empty = Projection(weight=mx.zeros((0, 8, 16)))
    ids, gates = int32([[-1, -1]]), mx.ones((1, 2))
    assert module.expert_glu(tokens(1, 16), ids, empty, empty).shape == (1, 2, 8)
    assert mx.all(module.expert_down(mx.zeros((1, 2, 16)), ids, gates, empty) == 0)


def test_x_may_be_a_view(kernels: None) -> None:
    base = mx.random.normal((1 + 64,), key=mx.random.key(0))
    gate = projection("affine4-32", NUM_SLOTS, 8, 64, bias=False)
    check_glu(metal, base[1:].reshape(1, 64), SLOT_IDS[1], gate, gate)


# ------------------------------------------------------------------ bytes read


def bytes_per_slot(projection: Projection) -> dict[str, int]:
    parts = {
        "weight": projection.weight,
        "scales": projection.scales,
        "offsets": projection.offsets,
        "bias": projection.bias,
    }
    return {
        name: part.nbytes // projection.num_slots
        for name, part in parts.items()
        if part is not None
    }


@packings
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_each_slot_is_read_once(
    host_kernels: list[host.Launch], packing: str, num_tokens: int
) -> None:
    """Every byte of a slot that is visited once, and none of any other."""
    columns = 2 * COLUMNS[group_size(packing)]
    bias = packing in WITH_BIAS
    gate, up, down = (
        projection(packing, NUM_SLOTS, 13, columns, bias=bias, seed=i) for i in range(3)
    )
    ids = int32(SLOT_IDS[num_tokens])
    x = tokens(num_tokens, columns, mx.bfloat16)
    hidden = metal.expert_glu(x, ids, gate, up)
    hidden = mx.zeros((*hidden.shape[:2], columns))
    metal.expert_down(hidden, ids, mx.ones(ids.shape), down)
    visited = len({slot for token in SLOT_IDS[num_tokens] for slot in token} - {-1})
    glu, last = (launch.traffic for launch in host_kernels)
    for name, size in bytes_per_slot(gate).items():
        for buffer in (glu[f"gate_{name}"], glu[f"up_{name}"], last[f"down_{name}"]):
            assert buffer.read == buffer.distinct == visited * size, name
    own_pairs = sum(slot >= 0 for token in SLOT_IDS[num_tokens] for slot in token)
    assert glu["hidden"].written == own_pairs * 13 * 4
    assert not last["out"].unwritten


# ------------------------------------------------------------------ bad arguments


def test_gate_and_up_differ() -> None:
    gate, up = (
        projection(packing, 2, 8, 64, bias=False) for packing in ("float16", "mxfp4")
    )
    with pytest.raises(ValueError, match="packed alike"):
        metal.expert_glu(tokens(1, 64), int32([[0]]), gate, up)


def test_width_differs(module: ModuleType) -> None:
    gate = projection("affine4-64", 2, 8, 64, bias=False)
    with pytest.raises(ValueError):
        module.expert_glu(tokens(1, 128), int32([[0]]), gate, gate)
    with pytest.raises(ValueError):
        hidden, gates = mx.zeros((1, 1, 128)), mx.ones((1, 1))
        module.expert_down(hidden, int32([[0]]), gates, gate)


def test_projection_needs_a_known_packing() -> None:
    good = projection("affine4-64", 2, 8, 128, bias=False)
    parts = {"weight": good.weight, "scales": good.scales, "offsets": good.offsets}
    with pytest.raises(ValueError, match=r"bits in \(4, 8\).*got 3 bits"):
        Projection(**parts, bits=3)
    with pytest.raises(ValueError, match="must have 8 words"):
        Projection(**parts, group_size=32)
    with pytest.raises(ValueError, match="needs scales"):
        Projection(weight=good.weight)
