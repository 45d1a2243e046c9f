"""The cost model against hand-computed cases, limits and simulation."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import comb

import numpy as np
import pytest

from mlx_ep.loading.shape import model_shape
from mlx_ep.policy.cost import ARMS, layer_cost, prefill_seconds, step_cost
from mlx_ep.policy.costs import CollectiveTable, Link, MatrixCost
from mlx_ep.policy.expected import (
    expected_distinct,
    expected_pairs,
    experts_of_ranks,
    sampled_counts,
)
from mlx_ep.policy.layer_cost import SORTED_ROWS, TILE_ROWS, dense_seconds
from mlx_ep.policy.profile import Profile, cost_key, overridden
from mlx_ep.policy.shape import (
    MXFP4,
    LayerShape,
    Matrices,
    ModelShape,
    affine,
    layer_from_json,
    model_from_json,
    named_layer,
)
from tests import tiny

JACCL = Link(transport="jaccl", topology="mesh", latency=30e-6, bandwidth=6e9)
RING = Link(transport="ring", topology="ring", latency=100e-6, bandwidth=1e9)
# Round numbers: nothing is fixed but what a test asks for.
PROFILE = Profile(
    name="round",
    memory_bandwidth=1e9,
    copy_bandwidth=1e12,
    matmul_rate=1e12,
    expert_rate=1e12,
    unsorted_rate=1e12,
    attention_rate=1e12,
    block_seconds=0.0,
    layer_seconds=0.0,
    step_seconds=0.0,
    element_seconds=0.0,
    route_seconds=0.0,
    sync_seconds=0.0,
    memory_bytes=1e12,
    links={"jaccl": JACCL, "ring": RING},
)
LAYER = LayerShape(
    num_experts=8,
    width=100,
    expert_width=50,
    top_k=2,
    expert_bytes=10_000,
    packing="affine 4 bit/64 bfloat16",
)
MODEL = ModelShape(
    layer=LAYER,
    num_layers=3,
    num_moe_layers=2,
    attention=Matrices(30_000, 60_000, 20_000),
    dense=Matrices(15_000, 30_000, 15_000),
    head=Matrices(10_000, 20_000),
    kv_bytes=400,
    attention_macs=200,
)


def exact_busiest(num_experts: int, top_k: int, num_ranks: int) -> float:
    """E[max over ranks] of the experts that one token uses, by counting choices."""
    sizes = [p.stop - p.start for p in experts_of_ranks(num_experts, num_ranks)]
    total = 0.0
    for split in product(range(top_k + 1), repeat=num_ranks):
        if sum(split) == top_k:
            ways = np.prod([comb(n, k) for n, k in zip(sizes, split, strict=True)])
            total += max(split) * ways / comb(num_experts, top_k)
    return total


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts, top_k", [(384, 8), (128, 8), (8, 2), (10, 3)])
def test_busiest_rank_of_one_token(num_experts, top_k, num_ranks) -> None:
    exact = exact_busiest(num_experts, top_k, num_ranks)
    found = expected_distinct(num_experts, top_k, 1, num_ranks)
    assert found == pytest.approx(exact, rel=0.01)
    # Each expert of one token is one pair.
    assert expected_pairs(num_experts, top_k, 1, num_ranks) == found


def test_busier_of_two_ranks_reads_5_of_8_experts() -> None:
    assert expected_distinct(384, 8, 1, 2) == pytest.approx(5.1, abs=0.02)
    assert expected_distinct(384, 8, 1, 1) == 8


@pytest.mark.parametrize("tokens", [3, 16, 100])
def test_distinct_experts_against_simulation(tokens) -> None:
    """Of the whole layer E (1 - (1 - K/E)^T); of the busier rank, by brute force."""
    num_experts, top_k = 64, 4
    every = num_experts * (1 - (1 - top_k / num_experts) ** tokens)
    assert expected_distinct(num_experts, top_k, tokens, 1) == pytest.approx(
        every, rel=0.01
    )
    random = np.random.default_rng(5)
    busiest, pairs = [], []
    for _ in range(1500):
        ids = np.argsort(random.random((tokens, num_experts)))[:, :top_k]
        halves = [ids[ids < 32], ids[ids >= 32]]
        busiest.append(max(len(np.unique(half)) for half in halves))
        pairs.append(max(half.size for half in halves))
    assert expected_distinct(num_experts, top_k, tokens, 2) == pytest.approx(
        np.mean(busiest), rel=0.01
    )
    assert expected_pairs(num_experts, top_k, tokens, 2) == pytest.approx(
        np.mean(pairs), rel=0.02
    )


def test_counts_are_choices_of_k_different_experts() -> None:
    counts = sampled_counts(10, 3, 7)
    assert counts.shape[1] == 10 and (counts.sum(axis=1) == 21).all()
    assert counts.max() <= 7
    assert (sampled_counts(10, 3, 1) <= 1).all()
    assert not sampled_counts(10, 3, 0).any()


@pytest.mark.parametrize("num_experts, num_ranks", [(10, 3), (2, 4), (8, 2)])
def test_ranks_share_all_experts(num_experts, num_ranks) -> None:
    parts = experts_of_ranks(num_experts, num_ranks)
    covered = [e for part in parts for e in range(num_experts)[part]]
    assert covered == list(range(num_experts)) and len(parts) == num_ranks
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_one_token_reads_its_experts_once() -> None:
    cost = layer_cost(PROFILE, LAYER, "single", tokens=1)
    # 2 experts of 10 kB at 1 GB/s; arithmetic is 2 x 2 x 15000 / 1e12 = 60 ns.
    assert cost.experts == pytest.approx(2 * 10_000 / 1e9)
    assert cost.seconds == cost.experts
    assert (cost.distinct_experts, cost.pairs, cost.collectives) == (2, 2, 0)


def test_many_tokens_are_bound_by_arithmetic() -> None:
    fast = overridden(PROFILE, {"memory_bandwidth": 1e15})
    tokens = 4096
    cost = layer_cost(fast, LAYER, "single", tokens=tokens)
    counts = sampled_counts(8, 2, tokens)
    assert counts.mean() > SORTED_ROWS
    padded = np.ceil(counts / TILE_ROWS) * TILE_ROWS
    rows = padded.sum(axis=1).mean()
    assert cost.experts == pytest.approx(2 * rows * 15_000 / 1e12)
    assert tokens * 2 <= rows < tokens * 2 * 1.02


def test_tensor_parallelism_halves_experts_and_sums_once() -> None:
    single = layer_cost(PROFILE, LAYER, "single", tokens=1)
    split = layer_cost(PROFILE, LAYER, "tp", tokens=1, num_ranks=2)
    assert split.experts == pytest.approx(single.experts / 2)
    # One all_sum of a token of 100 numbers of 2 bytes.
    assert split.communication == pytest.approx(30e-6 + 200 / 6e9)
    assert split.collectives == 1 and split.collective_bytes == 200


def test_replicated_experts_wait_for_the_busier_rank() -> None:
    cost = layer_cost(PROFILE, LAYER, "ep-replicated", tokens=1, num_ranks=2)
    busiest = exact_busiest(8, 2, 2)
    assert cost.experts == pytest.approx(busiest * 10_000 / 1e9, rel=0.01)
    # One all_sum of a token of 100 float32 numbers.
    assert cost.communication == pytest.approx(30e-6 + 400 / 6e9)
    same = layer_cost(PROFILE, LAYER, "ep-tensor", tokens=1, num_ranks=2)
    assert same == cost


def test_crossing_is_paid_for_each_collective() -> None:
    slow = overridden(PROFILE, {"links.jaccl.crossing_seconds": 180e-6})
    for arm in ("tp", "ep-replicated", "ep-gathered", "ep-all-to-all"):
        one, other = (
            layer_cost(p, LAYER, arm, tokens=64, num_ranks=2) for p in (PROFILE, slow)
        )
        more = other.communication - one.communication
        assert more == pytest.approx(other.collectives * 180e-6)


def test_sharded_arms_move_what_the_strategies_say() -> None:
    gathered = layer_cost(PROFILE, LAYER, "ep-gathered", tokens=64, num_ranks=2)
    # 32 tokens a rank: rows with routing in one, then 64 float32 sums scattered.
    assert gathered.collective_bytes == 32 * (200 + 2 * 8) + 4 * 64 * 100
    assert gathered.collectives == 2
    swapped = layer_cost(PROFILE, LAYER, "ep-all-to-all", tokens=64, num_ranks=2)
    assert swapped.collective_bytes == 32 * (200 + 2 * 8) + 32 * 200
    shared = replace(LAYER, shared=Matrices(10_000, 20_000))
    whole, part = (
        layer_cost(PROFILE, shared, arm, tokens=64, num_ranks=2).shared
        for arm in ("ep-replicated", "ep-gathered")
    )
    assert whole == pytest.approx(max(20_000 / 1e9, 2 * 64 * 10_000 / 1e12))
    assert part <= whole


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_more_of_anything_takes_no_less(arm, num_ranks) -> None:
    def seconds(profile=PROFILE, layer=LAYER, tokens=16):
        return layer_cost(
            profile, layer, arm, tokens=tokens, num_ranks=num_ranks
        ).seconds

    times = [seconds(tokens=t) for t in (1, 4, 16, 64, 256)]
    assert times == sorted(times)
    assert seconds(layer=replace(LAYER, expert_bytes=20_000)) > seconds()
    for name in ("memory_bandwidth", "links.jaccl.bandwidth", "matmul_rate"):
        assert seconds(overridden(PROFILE, {name: 1e6})) >= seconds()
    for name in ("block_seconds", "route_seconds", "links.jaccl.latency"):
        assert seconds(overridden(PROFILE, {name: 1.0})) >= seconds()


@pytest.mark.parametrize("arm", ARMS)
def test_one_rank_is_a_single_machine_whatever_the_arm(arm) -> None:
    layer = [layer_cost(PROFILE, LAYER, a, tokens=5) for a in (arm, "single")]
    assert layer[0] == layer[1]
    step = [
        step_cost(PROFILE, MODEL, a, tokens=5, phase="decode") for a in (arm, "single")
    ]
    assert step[0] == step[1]


def test_measured_runners_are_taken_and_the_fastest_by_itself() -> None:
    slow = MatrixCost(rows=(1.0, 2.0), seconds=(1e-9, 2e-9), call_seconds=1e-3)
    fast = MatrixCost(rows=(1.0, 2.0), seconds=(3e-9, 3.1e-9), visit_seconds=1e-6)
    costs = {
        cost_key("gather", LAYER.packing): slow,
        cost_key("blas", LAYER.packing): fast,
    }
    profile = replace(PROFILE, experts=costs)
    one = layer_cost(profile, LAYER, "single", tokens=1, runner="gather")
    assert one.experts == pytest.approx(1e-3 + 2 * 15_000 * 1e-9)
    other = layer_cost(profile, LAYER, "single", tokens=1, runner="blas")
    assert other.experts == pytest.approx(2 * (1e-6 + 15_000 * 3e-9))
    assert layer_cost(profile, LAYER, "single", tokens=1).runner == "blas"
    with pytest.raises(ValueError, match="no runner 'metal'"):
        layer_cost(profile, LAYER, "single", tokens=1, runner="metal")
    # Another dtype of the scales is the same packing, other bits are not.
    float32 = replace(LAYER, packing="affine 4 bit/64 float32")
    assert layer_cost(profile, float32, "single", tokens=1).runner == "blas"
    eight = replace(LAYER, packing=affine(8).name)
    assert layer_cost(profile, eight, "single", tokens=1).runner == "limits"


def test_waiting_for_the_device_is_counted_once() -> None:
    """The package's `gather` waits, mlx-lm's own block does not."""
    waits = overridden(PROFILE, {"sync_seconds": 1e-3})

    def fixed(arm, runner, profile=waits):
        return layer_cost(
            profile, LAYER, arm, tokens=1, num_ranks=2, runner=runner
        ).fixed

    assert fixed("ep-replicated", "gather") == 1e-3
    assert fixed("ep-replicated", "metal") == fixed("tp", "gather") == 0.0
    cost = MatrixCost(rows=(1.0,), seconds=(1e-9,), call_seconds=1.5e-3)
    measured = replace(waits, experts={cost_key("gather", LAYER.packing): cost})
    assert fixed("ep-replicated", "gather", measured) == 0.0
    for arm, call in (("single", 0.5e-3), ("ep-replicated", 1.5e-3)):
        found = layer_cost(measured, LAYER, arm, tokens=1)
        assert found.experts == pytest.approx(call + 2 * 15_000 * 1e-9)


def test_matrix_cost_between_and_beyond_measurements() -> None:
    cost = MatrixCost(rows=(1.0, 4.0, 16.0), seconds=(2.0, 1.0, 14.0))
    # The dip at 4 rows is noise: more rows are no less work.
    assert list(cost.per_weight(np.array([0, 1, 4, 10, 16, 28]))) == [
        0.0, 2.0, 2.0, 8.0, 14.0, 26.0,
    ]  # fmt: skip
    counts = np.array([[0, 1, 4], [0, 0, 0]])
    whole = MatrixCost(
        rows=(1.0, 4.0), seconds=(1.0, 4.0),
        call_seconds=100.0, visit_seconds=10.0, pair_seconds=0.5,
    )  # fmt: skip
    assert list(whole.of_experts(counts, 2, 3)) == [100 + 20 + 5 * 2 * 0.5 + 15, 0.0]


@pytest.mark.parametrize(
    "rows, seconds", [((), ()), ((2.0, 1.0), (1.0, 1.0)), ((1.0,), (1.0, 2.0))]
)
def test_matrix_cost_refuses(rows, seconds) -> None:
    with pytest.raises(ValueError, match=r"rows must ascend|one number for each"):
        MatrixCost(rows=rows, seconds=seconds)


def test_link_follows_from_latency_and_bandwidth() -> None:
    assert JACCL.seconds("all_reduce", 6000, 2) == pytest.approx(31e-6)
    assert JACCL.seconds("all_reduce", 6000, 4) == pytest.approx(31e-6)
    assert JACCL.seconds("all_gather", 6000, 4) == pytest.approx(31e-6)
    assert JACCL.seconds("reduce_scatter", 6000, 4) == pytest.approx(30.25e-6)
    assert JACCL.seconds("all_to_all", 6000, 2) == pytest.approx(30.5e-6)
    # JACCL has no all-to-all of 3 ranks: everything is gathered.
    assert JACCL.seconds("all_to_all", 6000, 3) == pytest.approx(31e-6)
    assert JACCL.seconds("all_reduce", 6000, 1) == 0.0
    # A ring of 4: 3 steps there, 3 back, with a quarter of the bytes each.
    assert RING.seconds("all_reduce", 4000, 4) == pytest.approx(600e-6 + 6e-6)
    assert RING.seconds("all_gather", 4000, 4) == pytest.approx(300e-6 + 12e-6)
    # The ring has no reduce-scatter: it sums everything.
    scattered = RING.seconds("reduce_scatter", 4000, 4)
    assert scattered == RING.seconds("all_reduce", 4000, 4)
    assert RING.seconds("all_to_all", 4000, 4) > RING.seconds("all_to_all", 4000, 2)
    with pytest.raises(ValueError, match="must be one of all_reduce"):
        JACCL.seconds("all_sum", 1, 2)


def test_measured_collectives_hold_for_their_number_of_ranks() -> None:
    table = CollectiveTable(ranks=2.0, bytes=(0.0, 100.0), seconds=(1.0, 2.0))
    link = replace(JACCL, tables={"all_to_all": table})
    assert link.seconds("all_to_all_v", 50, 2) == 1.5
    assert link.seconds("all_to_all", 300, 2) == 4.0
    assert link.seconds("all_to_all", 300, 3) < 1.0
    assert link.seconds("all_reduce", 6000, 2) == pytest.approx(31e-6)


def test_decode_step_by_hand() -> None:
    step = step_cost(PROFILE, MODEL, "single", tokens=1, phase="decode", context=9)
    assert step.num_moe_layers * step.moe.seconds == pytest.approx(2 * 20e-6)
    # Projections, and 10 tokens of the cache.
    assert step.attention == pytest.approx(60e-6 + 4e-6)
    assert step.dense == pytest.approx(30e-6)
    assert step.head == pytest.approx(20e-6)
    assert step.seconds == pytest.approx(40e-6 + 64e-6 + 30e-6 + 20e-6)
    assert step.tokens_per_second == pytest.approx(1 / step.seconds)


def test_tensor_parallel_step_by_hand() -> None:
    step = step_cost(
        PROFILE, MODEL, "tp", tokens=1, phase="decode", context=9, num_ranks=2
    )
    # 20000 of 30000 weights are split, and so are the heads of the cache.
    assert step.attention == pytest.approx(40e-6 + 2e-6)
    assert step.dense == pytest.approx(15e-6)
    assert step.head == pytest.approx(20e-6)
    # An all_sum for each attention, for the dense layer and for each MoE layer.
    assert step.collectives == 3 + 1 + 2
    assert step.communication == pytest.approx(4 * (30e-6 + 200 / 6e9))
    latents = replace(MODEL, kv_is_split=False)
    whole = step_cost(
        PROFILE, latents, "tp", tokens=1, phase="decode", context=9, num_ranks=2
    )
    assert whole.attention == pytest.approx(40e-6 + 4e-6)


def test_collectives_of_a_step_by_arm() -> None:
    def collectives(arm, tokens=4):
        return step_cost(
            PROFILE, MODEL, arm, tokens=tokens, phase="decode", num_ranks=2
        ).collectives

    assert collectives("single") == 0
    assert collectives("ep-replicated") == 2
    assert collectives("ep-tensor") == 3 + 2
    # The token counts once, then two for each MoE layer.
    assert collectives("ep-gathered") == collectives("ep-all-to-all") == 1 + 2 * 2


def test_data_parallel_attention_takes_its_own_tokens() -> None:
    fast = overridden(PROFILE, {"memory_bandwidth": 1e15})
    own, all_tokens = (
        step_cost(fast, MODEL, arm, tokens=64, phase="decode", num_ranks=2)
        for arm in ("ep-gathered", "ep-replicated")
    )
    assert own.attention == pytest.approx(all_tokens.attention / 2)
    assert own.head == pytest.approx(all_tokens.head / 2)


def test_sequences_are_not_split() -> None:
    """With data-parallel attention one prompt keeps one rank busy."""
    fast = overridden(PROFILE, {"memory_bandwidth": 1e15})

    def step(arm, sequences):
        return step_cost(
            fast, MODEL, arm, tokens=64, phase="prefill", sequences=sequences,
            num_ranks=2,
        )  # fmt: skip

    whole = step("ep-replicated", 1).attention
    assert step("ep-gathered", 1).attention == whole
    halves = step("ep-gathered", 2).attention
    assert halves == pytest.approx(step("ep-replicated", 2).attention / 2)
    with pytest.raises(ValueError, match="equally many of each of 3"):
        step("tp", 3)


def test_parts_of_a_prompt_leave_out_the_end_of_the_last_layer() -> None:
    options = {"tokens": 64, "phase": "prefill", "num_ranks": 2}
    part, last = (
        step_cost(PROFILE, MODEL, "tp", logits=logits, **options)
        for logits in (0, None)
    )
    assert (part.num_moe_layers, last.num_moe_layers) == (1, 2)
    assert part.collectives == last.collectives - 2
    assert (part.head == 0) and last.head > 0
    eager = step_cost(PROFILE, MODEL, "ep-gathered", logits=0, **options)
    assert eager.num_moe_layers == 2


def test_windows_limit_cache_and_scores() -> None:
    model = replace(MODEL, window=10, window_kv_bytes=300, window_macs=100)
    assert model.cache_bytes(5) == 5 * 400
    assert model.cache_bytes(100) == 100 * 100 + 10 * 300
    assert model.scores_macs(100) == 100 * 100 + 10 * 100
    with pytest.raises(ValueError, match="window_macs must be between 0 and 200"):
        replace(MODEL, window_macs=201)


def test_prompt_is_the_sum_of_its_steps() -> None:
    steps = [
        step_cost(
            PROFILE, MODEL, "tp", tokens=t, phase="prefill", context=c, logits=h,
            num_ranks=2,
        ).seconds
        for t, c, h in ((40, 0, 0), (40, 40, 0), (20, 80, None))
    ]  # fmt: skip
    total = prefill_seconds(
        PROFILE, MODEL, "tp", prompt=100, step_tokens=40, num_ranks=2
    )
    assert total == pytest.approx(sum(steps))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"arm": "pipeline"}, "An arm must be one of single"),
        ({"tokens": -1}, "tokens must be 0 or more"),
        ({"num_ranks": 0}, "num_ranks 1 or more"),
        ({"link": "mpi"}, "has no link 'mpi'; it has jaccl, ring"),
        ({"phase": "both"}, "phase must be prefill or decode"),
    ],
)
def test_refuses(arguments, message) -> None:
    given = {"arm": "tp", "tokens": 1, "num_ranks": 2, "phase": "decode", **arguments}
    with pytest.raises(ValueError, match=message):
        step_cost(PROFILE, MODEL, given.pop("arm"), **given)


def test_dense_matrices_are_read_or_multiplied() -> None:
    matrices = Matrices(1000, 2000)
    assert dense_seconds(PROFILE, matrices, "bfloat16", 1) == pytest.approx(2e-6)
    many = dense_seconds(PROFILE, matrices, "bfloat16", 10_000)
    assert many == pytest.approx(2 * 10_000 * 1000 / 1e12)
    assert dense_seconds(PROFILE, Matrices(), "bfloat16", 5) == 0.0
    cost = MatrixCost(rows=(1.0, 3.0), seconds=(1e-9, 2e-9))
    measured = replace(PROFILE, dense={"bfloat16": cost})
    assert dense_seconds(measured, matrices, "bfloat16", 2) == pytest.approx(1.5e-6)


def test_named_layers_and_packings() -> None:
    layer = named_layer("kimi-k2", scale=4)
    assert (layer.num_experts, layer.width, layer.expert_width) == (384, 1792, 512)
    assert layer.bytes_per_weight == 0.5625
    assert named_layer("8,64,128,2", MXFP4).expert_bytes == 3 * 64 * 128 * 17 // 32
    assert named_layer("8,64,128,2", affine(4, 64, "float32")).bytes_per_weight == 0.625
    for name, message in (("kimi", "must be one of"), ("8,64,128", "four numbers")):
        with pytest.raises(ValueError, match=message):
            named_layer(name)
    with pytest.raises(ValueError, match="multiples of the packing's group"):
        named_layer("kimi-k2", scale=3)
    with pytest.raises(ValueError, match="top_k must be at most"):
        named_layer("8,64,128,9")


def test_shapes_survive_json() -> None:
    layer = named_layer("mixtral-8x7b")
    assert layer_from_json(layer.to_json()) == layer
    assert model_from_json(MODEL.to_json()) == MODEL
    with pytest.raises(ValueError, match="has no widht"):
        layer_from_json({**layer.to_json(), "widht": 1})
    with pytest.raises(ValueError, match="lacks values"):
        layer_from_json({"width": 1})


CONFIGURATIONS = {
    "qwen3_moe": tiny.QWEN3_MOE,
    "deepseek_v3": tiny.DEEPSEEK_V3,
    "gpt_oss": tiny.GPT_OSS,
    "qwen2_moe": tiny.QWEN2_MOE,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_model_shape_counts_every_matrix(name) -> None:
    """Against the parameters of the model itself."""
    from mlx.utils import tree_flatten

    config = CONFIGURATIONS[name]
    shape = model_shape(config, dtype="float32")
    parameters = dict(tree_flatten(tiny.make_model(config).parameters()))
    matrices = {
        path: array
        for path, array in parameters.items()
        if path.endswith("weight") and array.ndim > 1 and "embed_tokens" not in path
    }
    counted = shape.attention + shape.dense + shape.head
    each = shape.layer.router.weights + shape.layer.shared.weights
    each += shape.layer.num_experts * shape.layer.expert_weights
    total = counted.weights + shape.num_moe_layers * each
    assert total == sum(array.size for array in matrices.values())
    assert shape.num_layers == config["num_hidden_layers"]
    assert shape.layer.top_k == config["num_experts_per_tok"]


def test_model_shape_of_known_numbers() -> None:
    shape = model_shape(tiny.QWEN3_MOE)
    layers, heads, kv_heads, head = 3, 4, 2, 16
    assert shape.kv_bytes == layers * 2 * kv_heads * head * 2
    assert shape.attention_macs == layers * 2 * heads * head
    assert shape.num_moe_layers == 2
    # shard() splits the four projections and the dense layer's three.
    assert shape.attention.split_weights == shape.attention.weights
    assert shape.dense.split_weights == shape.dense.weights == 3 * 64 * 96
    assert shape.layer.router == Matrices(640, 1280)
    assert shape.has_shard and shape.kv_is_split
    assert not model_shape(tiny.QWEN2_MOE).has_shard
    windowed = model_shape(tiny.GPT_OSS)
    assert (windowed.window, windowed.window_kv_bytes) == (16, windowed.kv_bytes // 2)
    latents = model_shape(tiny.DEEPSEEK_V3)
    assert not latents.kv_is_split and latents.kv_bytes == 3 * (32 + 16) * 2


def test_model_shape_of_a_quantized_model() -> None:
    config = {**tiny.QWEN3_MOE, "quantization": {"group_size": 32, "bits": 4}}
    shape = model_shape(config)
    assert shape.layer.packing == "affine 4 bit/32 bfloat16"
    assert shape.layer.expert_bytes == affine(4, 32).num_bytes(3 * 64 * 32)
    assert shape.dense_packing == shape.layer.packing
    assert shape.attention.num_bytes == affine(4, 32).num_bytes(shape.attention.weights)


def test_held_bytes_by_arm() -> None:
    whole = MODEL.num_bytes
    assert MODEL.held_bytes("single", 2) == whole
    experts = MODEL.expert_bytes
    assert MODEL.held_bytes("ep-replicated", 2) == whole - experts // 2
    split = MODEL.held_bytes("ep-tensor", 2)
    assert split == whole - experts // 2 - 20_000
    assert MODEL.held_bytes("tp", 2) == split - 15_000
    assert MODEL.held_bytes("ep-replicated", 3) == whole - experts + 2 * 3 * 10_000
