"""`MixtureOfExperts`: the same layer on any number of ranks."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.reference import moe_sum, swiglu_expert

pytestmark = pytest.mark.requires("ranks")

D, F, E, K = 64, 32, 5, 2
STRATEGIES = ("replicated", "gathered", "low_latency", "normal", "auto")


def layer_of(group, strategy, num_experts=E, **options):
    from mlx_ep import EPConfig
    from mlx_ep.moe import MixtureOfExperts

    mx.random.seed(4)
    most = 32 if strategy == "low_latency" else 8  # the others go in rounds
    config = EPConfig(strategy=strategy, low_latency_tokens=most, round_tokens=most)
    return MixtureOfExperts(D, F, num_experts, K, group=group, config=config, **options)


def tokens_of(rank, num_tokens):
    random = np.random.default_rng(50 + rank)
    return mx.array(random.normal(size=(num_tokens, D)).astype(np.float32))


def whole_weights(num_experts):
    """The experts as one process draws them."""
    from mlx_lm.models.switch_layers import SwitchGLU

    from mlx_ep.router import TopKRouter

    mx.random.seed(4)
    TopKRouter(D, num_experts, K)
    switch = SwitchGLU(D, F, num_experts)
    names = ("gate_proj", "up_proj", "down_proj")
    return [np.array(switch[name].weight) for name in names]


def check_layer(group):
    """By value, with 0, few and many tokens, on every strategy."""
    rank, size = group.rank(), group.size()
    for num_experts in (E, 2):  # 2 experts on 3 ranks: one rank holds none
        weights = whole_weights(num_experts)
        experts = [swiglu_expert(*(w[e] for w in weights)) for e in range(num_experts)]
        for strategy in STRATEGIES:
            layer = layer_of(group, strategy, num_experts)
            held = layer.experts.gate_proj.weight.shape[0]
            assert held == num_experts // size + (rank < num_experts % size)
            shares = strategy == "replicated"
            for num_tokens in (3,) if shares else (3, 2 * rank, 19 * (rank == 0)):
                x = tokens_of(0 if shares else rank, num_tokens)
                routing = layer.router(x)
                ids, gates = np.array(routing.expert_ids), np.array(routing.gates)
                expected = moe_sum(np.array(x), ids, gates, experts)
                got = layer(x[None])
                assert got.shape == (1, num_tokens, D) and got.dtype == x.dtype
                np.testing.assert_allclose(
                    np.array(got[0]), expected, atol=1e-5, err_msg=strategy
                )


def run_quantized(group, strategy, dtype):
    """The outputs of one global batch, quantized, in the order of the tokens."""
    rank, size = group.rank(), group.size()
    layer = layer_of(group, strategy)
    nn.quantize(layer, group_size=32, bits=4)
    assert "scales" in layer.experts.gate_proj
    layer.set_dtype(getattr(mx, dtype))
    x = tokens_of(0, 12).astype(getattr(mx, dtype))
    part = slice(None) if strategy == "replicated" else slice(rank, None, size)
    y = layer(x[part])
    assert y.dtype == x.dtype
    return np.array(y.astype(mx.float32))


def check_quantized(group):
    return {
        (strategy, dtype): run_quantized(group, strategy, dtype)
        for strategy in STRATEGIES
        for dtype in ("float32", "bfloat16")
    }


def check_all(group):
    check_layer(group)
    return check_quantized(group)


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(1, check_all)[0]


def test_one_rank_agrees_with_itself(one_rank):
    for dtype, atol in (("float32", 1e-5), ("bfloat16", 0.02)):
        for strategy in STRATEGIES:
            expected = one_rank["replicated", dtype]
            got = one_rank[strategy, dtype]
            np.testing.assert_allclose(got, expected, atol=atol, err_msg=strategy)


@pytest.mark.requires("mpi")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks(num_ranks, one_rank):
    results = run_ranks(num_ranks, check_all, transport="mpi")
    for (strategy, dtype), expected in one_rank.items():
        for rank, result in enumerate(results):
            shares = strategy == "replicated"
            part = slice(None) if shares else slice(rank, None, num_ranks)
            np.testing.assert_allclose(
                result[strategy, dtype],
                expected[part],
                atol=1e-5 if dtype == "float32" else 0.02,
                err_msg=f"{strategy} {dtype} rank {rank}",
            )
