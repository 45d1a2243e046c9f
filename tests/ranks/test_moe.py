"""`MixtureOfExperts`: the same layer on any number of ranks."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.reference import moe_sum, swiglu_expert

pytestmark = pytest.mark.requires("ranks")

D, F, E, K = 64, 32, 5, 2
ATOL = {"float32": 1e-5, "float16": 0.005, "bfloat16": 0.02}
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

    from mlx_ep.moe import TopKRouter

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


def run_layer(group, strategy, dtype, bits):
    """The outputs of one global batch in the order of the tokens; bits: None is dense.

    Dense 16-bit experts are what MLX's gather_mm refuses on a CPU.
    """
    rank, size = group.rank(), group.size()
    layer = layer_of(group, strategy)
    if bits:
        nn.quantize(layer, group_size=32, bits=bits)
        assert "scales" in layer.experts.gate_proj
    layer.set_dtype(getattr(mx, dtype))
    x = tokens_of(0, 12).astype(getattr(mx, dtype))
    part = slice(None) if strategy == "replicated" else slice(rank, None, size)
    y = layer(x[part])
    assert y.dtype == x.dtype
    return np.array(y.astype(mx.float32))


# What is in the experts: bits and the dtype of rows.
CONTENTS = ((4, "float32"), (4, "bfloat16"), (None, "float16"), (None, "bfloat16"))


def check_contents(group):
    return {
        (strategy, dtype, bits): run_layer(group, strategy, dtype, bits)
        for strategy in STRATEGIES
        for bits, dtype in CONTENTS
    }


def check_all(group):
    check_layer(group)
    return check_contents(group)


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(1, check_all)[0]


def test_one_rank_agrees_with_itself(one_rank):
    for bits, dtype in CONTENTS:
        for strategy in STRATEGIES:
            expected = one_rank["replicated", dtype, bits]
            got = one_rank[strategy, dtype, bits]
            atol = ATOL[dtype]
            np.testing.assert_allclose(got, expected, atol=atol, err_msg=strategy)


def rounded(values, dtype):
    return np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32))


def test_dense_16_bit_layers_are_right(one_rank):
    """Beside float64 loops over the weights as they were rounded."""
    weights = whole_weights(E)
    x = np.array(tokens_of(0, 12))
    layer = layer_of(mx.distributed.init(), "replicated")
    for dtype in ("float16", "bfloat16"):
        layer.router.set_dtype(getattr(mx, dtype))
        routing = layer.router(mx.array(x).astype(getattr(mx, dtype)))
        parts = [[rounded(w[e], dtype) for w in weights] for e in range(E)]
        experts = [swiglu_expert(*part) for part in parts]
        ids, gates = np.array(routing.expert_ids), np.array(routing.gates)
        expected = moe_sum(rounded(x, dtype), ids, gates, experts)
        got = one_rank["replicated", dtype, None]
        np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.requires("mpi")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks(num_ranks, one_rank):
    results = run_ranks(num_ranks, check_all, transport="mpi")
    for (strategy, dtype, bits), expected in one_rank.items():
        for rank, result in enumerate(results):
            shares = strategy == "replicated"
            part = slice(None) if shares else slice(rank, None, num_ranks)
            np.testing.assert_allclose(
                result[strategy, dtype, bits],
                expected[part],
                atol=ATOL[dtype],
                err_msg=f"{strategy} {dtype} {bits} rank {rank}",
            )


def test_settings_of_models_have_no_effect():
    from mlx_ep import EPConfig
    from mlx_ep.moe import MixtureOfExperts

    with pytest.warns(UserWarning, match="runner='gather' and backend='auto' have no"):
        MixtureOfExperts(8, 8, 2, 1, config=EPConfig(runner="gather"))
