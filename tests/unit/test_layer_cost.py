"""What a layer on one rank adds to mlx-lm's: primitives, waits; and its sums."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from benchmarks import bench_decode_overhead as bench
from mlx_ep.experts.gather import GatherRunner
from mlx_ep.metrics import Counters
from mlx_ep.models import find_moe_sites
from mlx_ep.types import CompleteRows, Rows

WIDTHS = (64, 64)


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_a_layer_on_one_rank_costs_little_more_than_the_block(family: str) -> None:
    site = find_moe_sites(bench.make_model(family, *WIDTHS))[-1]
    block, state = site.block, bench.ours(family, WIDTHS, "gather")
    x = mx.random.normal((1, 1, 64), key=mx.random.key(0))
    mx.eval(x)
    found = bench.counts(block, site.switch_path_in(block), state, x)
    more = found["beside_ours"] - found["beside_mlx_lm"]
    assert more <= bench.MOST_MORE_PRIMITIVES
    # The weighting of the outputs has one more: gates are [T, K] in between.
    assert found["primitives_ours"] <= found["primitives_mlx_lm"] + more + 1
    assert found["syncs_gather"] == found["syncs_metal"] == 0
    assert mx.array_equal(state.form.holder(x), block(x))  # float32: the same bits


def test_waits_are_counted_once_per_array() -> None:
    x = mx.ones(3)

    def waits_twice() -> None:
        mx.eval(x)
        np.array(x)  # on the host already
        (x + 1).tolist()
        np.zeros(3).tolist()

    assert bench.host_syncs(waits_twice) == 2
    assert bench.host_syncs(lambda: x + 1) == 0


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_complete_rows_give_the_sums_of_others(num_rows: int) -> None:
    """By the switch as they are, and pair by pair; 40 rows are sorted by the switch."""
    mx.random.seed(1)
    switch = SwitchGLU(32, 16, 5)
    ids = mx.argsort(mx.random.normal((num_rows, 5)), axis=1)[:, :3].astype(mx.int32)
    x, gates = mx.random.normal((num_rows, 32)), mx.random.uniform(shape=ids.shape)
    counters, others = Counters(), Counters()
    runner = GatherRunner(switch)
    found = runner.partial_sum(CompleteRows(x, ids, gates), counters)
    expected = runner.partial_sum(Rows(x, ids, gates), others)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-6)
    assert counters == others
    assert counters.pairs_computed == 3 * num_rows


def test_half_of_the_samples_are_in_the_other_order() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in "ab"}
    found = bench.in_both_orders(arms, 5, warmup=1)
    assert "".join(order) == "ab" + 3 * "ab" + 2 * "ba"
    assert {len(samples.seconds) for samples in found.values()} == {5}
