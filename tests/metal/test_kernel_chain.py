"""All kernels in a row: a layer on several ranks equals the layer in one place."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.kernels import Projection
from tests.support import kernel_reference
from tests.support.projections import projection

WIDTH = 64
RANKS = np.array([0, 0, 2, 2, 2, 3, 3, 0])  # of each expert; rank 1 has none
SLOTS = np.array([0, 1, 0, 1, 2, 0, 1, 2])  # on its rank
GROUP_SLOTS = np.array([0, 1, 3, 4, 5, 6, 7, 2])  # in the group, rank-major
NUM_RANKS = 4


def held_by(rank: int, whole: Projection) -> Projection:
    experts = mx.array(np.flatnonzero(rank == RANKS)[np.argsort(SLOTS[rank == RANKS])])
    if not experts.size:
        return Projection(weight=mx.zeros((0, whole.rows, whole.columns)))
    parts = {
        name: None if part is None else part[experts]
        for name in ("weight", "scales", "offsets", "bias")
        for part in [getattr(whole, name)]
    }
    return Projection(**parts, bits=whole.bits, group_size=whole.group_size)


@pytest.mark.parametrize("packing", ["float32", "affine4-32", "mxfp4"])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_layer_on_ranks(module: ModuleType, packing: str, num_tokens: int) -> None:
    random = np.random.default_rng(num_tokens)
    ids = np.array([random.permutation(8)[:3] for _ in range(num_tokens)], np.int32)
    ids[-1, 0] = -1
    gate, up, down = (
        projection(packing, 8, WIDTH, WIDTH, bias=True, seed=i) for i in range(3)
    )
    x = mx.random.normal((num_tokens, WIDTH), key=mx.random.key(0))
    gates = mx.random.uniform(shape=ids.shape, key=mx.random.key(1))

    plan = module.route_plan(
        mx.array(ids),
        mx.array(RANKS.astype(np.int32))[:, None],
        mx.array(GROUP_SLOTS.astype(np.int32))[:, None],
        num_ranks=NUM_RANKS,
        num_slots=8,
    )
    rows = module.pack_rows(x, plan.row_tokens, plan.rank_offsets[-1:])
    offsets, returned = np.array(plan.rank_offsets), []
    for rank in range(NUM_RANKS):
        # What the rank gets: its rows, and of each row's experts those that it holds.
        here = slice(int(offsets[rank]), int(offsets[rank + 1]))
        tokens = np.array(plan.row_tokens)[here]
        own = (ids[tokens] >= 0) & (RANKS[ids[tokens]] == rank)
        slot_ids = mx.array(np.where(own, SLOTS[ids[tokens]], -1).astype(np.int32))
        parts = [held_by(rank, whole) for whole in (gate, up, down)]
        hidden = module.expert_glu(rows[here], slot_ids, *parts[:2])
        row_gates = gates[mx.array(tokens)]
        returned.append(module.expert_down(hidden, slot_ids, row_gates, parts[2]))
    ones = mx.ones(plan.token_rows.shape)
    out = module.unpack_sum(mx.concatenate(returned), plan.token_rows, ones)

    hidden = kernel_reference.expert_glu(x, ids, gate, up, "swiglu").astype(np.float32)
    expected = kernel_reference.expert_down(mx.array(hidden), ids, gates, down)
    error = np.abs(kernel_reference.as_float64(out) - expected).max()
    assert error <= 1e-5 * max(1.0, np.abs(expected).max())
