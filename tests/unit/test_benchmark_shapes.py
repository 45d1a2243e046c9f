"""What the benchmark measures: shapes, weights, tokens, and who has which part."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ep.benchmark.arms import (
    ARMS,
    distinct_on_busiest,
    rank_weight_bytes,
    token_counts,
    why_not,
)
from mlx_ep.benchmark.block import Router
from mlx_ep.benchmark.experts import SHARDING, random_switch, weight_bytes
from mlx_ep.benchmark.shapes import (
    MODES,
    NAMED_LAYERS,
    make_shape,
    make_weights,
    parse_counts,
    why_no_tensor_parallelism,
)
from mlx_ep.benchmark.tokens import TokenSource
from mlx_ep.placement import Placement


def weights_of(mode="affine", bits=None, group_size=None):
    if mode == "affine":
        group_size = group_size or 32
    return make_weights(mode, bits, group_size, "float32")


TINY = "8,128,64,2"


@pytest.mark.parametrize("name", NAMED_LAYERS)
def test_named_shapes(name):
    mode = "mxfp4" if name == "gpt-oss-120b" else "affine"
    weights = make_weights(mode, None, None, "bfloat16")
    shape = make_shape(name, 1, weights)
    numbers = (shape.num_experts, shape.width, shape.expert_width, shape.top_k)
    assert numbers == NAMED_LAYERS[name]
    # 4 bits, and a scale and an offset of 16 bits for 64, or a byte for 32.
    per_weight = {"affine": 0.5 + 4 / 64, "mxfp4": 0.5 + 1 / 32}[mode]
    assert shape.expert_bytes == 3 * shape.width * shape.expert_width * per_weight
    assert why_no_tensor_parallelism(shape, weights, 2) == ""


def test_scale_divides_the_widths_only():
    shape = make_shape("kimi-k2", 4, make_weights("affine", None, None, "float32"))
    assert (shape.num_experts, shape.width, shape.expert_width) == (384, 1792, 512)
    assert shape.name == "kimi-k2/4"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("no-such-model", 1, weights_of()), "got 'no-such-model'"),
        (("8,128,64", 1, weights_of()), "four numbers E,D,F,K"),
        (("kimi-k2", 5, weights_of()), "must be multiples of the packing"),
        (("kimi-k2", 32, weights_of()), "got D=224 and E=384"),
    ],
)
def test_wrong_shapes(arguments, text):
    with pytest.raises(ValueError, match=text):
        make_shape(*arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("affine", 7, None, "float32"), "got 7 and 64"),
        (("affine", 4, 48, "float32"), "got 4 and 48"),
        (("mxfp4", 8, None, "float32"), "mxfp4 has --bits 4; got 8"),
        (("mxfp8", None, 64, "float32"), "mxfp8 has --group-size 32; got 64"),
    ],
)
def test_wrong_weights(arguments, text):
    with pytest.raises(ValueError, match=text):
        make_weights(*arguments)


def test_counts():
    assert parse_counts("--tokens", "16,1,4,4") == [1, 4, 16]
    for text in ("0,1", "a", "", "1,-2"):
        with pytest.raises(ValueError, match="--tokens must be whole numbers"):
            parse_counts("--tokens", text)


def test_why_an_arm_does_not_exist():
    weights = weights_of()
    shape = make_shape(TINY, 1, weights)
    found = {arm: why_not(arm, "layer", shape, weights, 2) for arm in ARMS}
    assert [arm for arm, why in found.items() if why] == ["ep-tensor"]
    assert "attention only" in found["ep-tensor"]
    assert why_not("ep-tensor", "e2e", None, None, 2) == ""
    # 64 = 3 x 21.3 and 64 = 4 x 16, which is half of a group of 32.
    assert "F=64 over 3 ranks, 21.3333 each" in why_not(
        "tp", "layer", shape, weights, 3
    )
    assert "group of 32" in why_not("tp", "layer", shape, weights, 4)
    assert why_not("ep-replicated", "layer", shape, weights, 3) == ""
    assert [a for a in ARMS if not why_not(a, "e2e", None, None, 1)] == ["single"]


@pytest.mark.parametrize(
    ("mode", "bits"), [("affine", 3), ("affine", 4), ("mxfp4", None), ("mxfp8", None)]
)
def test_weights_have_the_size_and_spread_that_they_should(mode, bits):
    assert mode in MODES
    weights = weights_of(mode, bits)
    shape = make_shape(TINY, 1, weights)
    switch = random_switch(shape, weights, range(8))
    assert weight_bytes(switch) == 8 * shape.expert_bytes
    for name in SHARDING:
        linear = switch[name]
        columns = 64 if name == "down_proj" else 128
        matrix = mx.dequantize(
            linear.weight,
            linear.scales,
            linear.get("biases"),
            group_size=weights.packing.group_size,
            bits=weights.packing.bits,
            mode=weights.packing.mode,
            dtype=mx.float32,
        )
        assert matrix.shape[-1] == columns
        numbers = np.array(matrix)
        assert np.isfinite(numbers).all()
        # Scales of the fp formats are powers of two: within a factor of sqrt(2).
        assert 0.65 < numbers.std() * columns**0.5 < 1.5
        assert abs(numbers.mean()) < 0.1 * numbers.std()


@pytest.mark.parametrize("mode", MODES)
def test_shares_are_parts_of_the_same_experts(mode):
    """Coverage: what two ranks hold is the whole, nothing twice."""
    weights = weights_of(mode)
    shape = make_shape("5,128,64,2", 1, weights)
    whole = random_switch(shape, weights, range(5))
    ranks = [SimpleNamespace(rank=lambda r=r: r, size=lambda: 2) for r in range(2)]
    split = [random_switch(shape, weights, range(5), ranks[r]) for r in range(2)]
    placement = Placement.contiguous(5, 2)
    own = [random_switch(shape, weights, experts) for experts in placement.rank_experts]
    for name in SHARDING:
        axis = -1 if name == "down_proj" else -2
        fields = [k for k, v in whole[name].items() if isinstance(v, mx.array)]
        assert "weight" in fields and "scales" in fields
        for field in fields:
            expected = whole[name][field]
            for parts, along in ((split, axis), (own, 0)):
                joined = mx.concatenate([part[name][field] for part in parts], along)
                assert mx.array_equal(joined, expected), (name, field)
    assert sum(map(weight_bytes, split)) == weight_bytes(whole)


def test_a_rank_without_experts():
    weights = weights_of()
    shape = make_shape(TINY, 1, weights)
    switch = random_switch(shape, weights, [])
    assert weight_bytes(switch) == 0
    assert switch.gate_proj.weight.shape[0] == 0


def test_rank_weight_bytes_by_hand():
    shape = make_shape("5,128,64,2", 1, weights_of())
    one = shape.expert_bytes
    every = ["single", "tp", "ep-replicated", "ep-gathered"]
    # rank 0: all 5, half of all, 3 of its own; rank 1: half of all, 2 of its own.
    assert rank_weight_bytes(every, shape, 2, 0) == 5 * one + 5 * one // 2 + 3 * one
    assert rank_weight_bytes(every, shape, 2, 1) == 5 * one // 2 + 2 * one
    assert rank_weight_bytes(["single"], shape, 2, 1) == 0


def test_token_counts_cover():
    for num_tokens in (0, 1, 2, 7):
        for num_ranks in (1, 2, 3, 4):
            counts = token_counts(num_tokens, num_ranks)
            assert sum(counts) == num_tokens and len(counts) == num_ranks
            assert max(counts) - min(counts) <= 1
            assert list(counts) == sorted(counts, reverse=True)


def test_distinct_experts_by_hand():
    placement = Placement.contiguous(6, 2)  # 0 1 2 | 3 4 5
    ids = np.array([[0, 1], [1, 4], [2, 0]], np.int32)
    assert distinct_on_busiest("single", ids, placement) == 4
    assert distinct_on_busiest("tp", ids, placement) == 2  # half of each of 4
    assert distinct_on_busiest("ep-replicated", ids, placement) == 3
    assert distinct_on_busiest("ep-all-to-all", ids, placement) == 3


class TestTokens:
    def source(self, skew=0.0, name="16,64,32,4"):
        return TokenSource(make_shape(name, 1, weights_of()), mx.float32, skew)

    def test_ids_are_distinct_and_differ_between_samples(self):
        ids = self.source().expert_ids(50, 0)
        assert ids.shape == (50, 4) and ids.dtype == np.int32
        assert all(len(set(row)) == 4 for row in ids.tolist())
        assert not np.array_equal(ids, self.source().expert_ids(50, 1))
        assert np.array_equal(ids, self.source().expert_ids(50, 0))

    def test_the_router_of_the_block_picks_them(self):
        """Through mlx-lm's own block, in float32 and in bfloat16."""
        source = self.source()
        ids = source.expert_ids(40, 3)
        x = source.tokens(ids, 3)
        for dtype in (mx.float32, mx.bfloat16):
            block = nn.Module()
            block.gate = nn.Linear(64, 16, bias=False)
            block.gate.weight = mx.array(source.router).astype(dtype)
            chosen, gates = Router(source.shape, block)(x.astype(dtype))
            assert np.array_equal(np.sort(np.array(chosen), 1), np.sort(ids, 1))
            total = np.array(gates.astype(mx.float32)).sum(axis=1)
            np.testing.assert_allclose(total, 1, atol=2e-2)

    def test_tokens_have_about_unit_variance(self):
        x = np.array(self.source().tokens(self.source().expert_ids(64, 0), 0))
        assert 0.7 < x.std() < 2

    def test_uniform_and_skewed(self):
        counts = {
            skew: np.bincount(self.source(skew).expert_ids(2000, 0).ravel())
            for skew in (0.0, 1.0)
        }
        assert counts[0.0].max() < 1.2 * counts[0.0].min()
        assert counts[1.0].max() > 3 * counts[1.0].min()
