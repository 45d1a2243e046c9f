"""Rows that travel in 8 bits, or in bfloat16, on real ranks: what comes, and bytes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support.cases import routing_cases
from tests.support.kernel_reference import calc_diff
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.requires("ranks")
MPI, SLOW = pytest.mark.requires("mpi"), pytest.mark.slow

D, E, K = 160, 7, 3
DTYPES = (mx.float32, mx.bfloat16)
CASES = ("uneven T", "no tokens on rank 0", "all to the last rank", "distinct")


def configs():
    small = {"low_latency_tokens": 4, "round_tokens": 4}
    return {
        "gathered": {"strategy": "gathered"},
        "gathered in rounds": {"strategy": "gathered", **small},
        "low_latency": {"strategy": "low_latency"},
        "normal": {"strategy": "normal"},
        "normal in rounds": {"strategy": "normal", **small},
        "auto": {"strategy": "auto", **small},
    }


def rounded(x, form):
    """The tokens as the experts are to see them."""
    from mlx_ep.kernels import ops

    if form == "bf16":
        return x.astype(mx.bfloat16).astype(x.dtype)
    words = ops.quantize_rows(x, form)
    return ops.dequantize_rows(words, form, x.shape[1], x.dtype)


def runner_of(placement, rank):
    """Experts that weight each value, as what travels is what is tested."""
    weights = np.random.default_rng(5).normal(size=(E, D)).astype(np.float32)
    own = mx.array(weights[list(placement.rank_experts[rank])])

    def run(rows, slots):
        return (rows * own[slots]).astype(rows.dtype)

    return run


def rows_between(case, placement, rank):
    """Rows from this rank to each rank, and from each rank to it."""

    def count(ids, owner):
        held = np.isin(ids, placement.rank_experts[owner]) & (ids >= 0)
        return int(held.any(axis=1).sum())

    ranks = range(placement.num_ranks)
    return {
        "rows_to": tuple(count(case.expert_ids[rank], peer) for peer in ranks),
        "rows_from": tuple(count(case.expert_ids[peer], rank) for peer in ranks),
    }


class Recording:
    """The collectives that go through a `CountedComm`, by name and bytes."""

    def __init__(self, comm):
        from mlx_ep.exchange import CountedComm
        from mlx_ep.metrics import Counters

        self.calls = []
        self.comm = CountedComm(comm, Counters())
        self.comm.record = lambda name, x: self.calls.append((name, x.nbytes))


def check_sums(comm, placement, case, dtype, form):
    """The unquantised exchange of rounded tokens, bit for bit, on every strategy."""
    from mlx_ep import EPConfig
    from mlx_ep.moe import ExpertGroup
    from mlx_ep.types import Routing

    x = tokens_of(case, comm.rank, dtype)
    routing = Routing(*map(mx.array, routing_of(case, comm.rank)))
    runner = runner_of(placement, comm.rank)
    for name, settings in configs().items():
        what = f"{name}, {case.name}, {dtype}, {form}"
        plain = ExpertGroup.from_config(comm, placement, EPConfig(**settings))
        config = EPConfig(**settings, dispatch_dtype=form)
        group = ExpertGroup.from_config(comm, placement, config)
        # K outputs a token are gathered, whatever the strategy.
        methods = ["weighted_sum", *["slot_outputs"] * (name == "gathered")]
        for method in methods:
            got = getattr(group, method)(x, routing, runner)
            expected = getattr(plain, method)(rounded(x, form), routing, runner)
            exact = getattr(plain, method)(x, routing, runner)
            mx.eval(got, expected, exact)
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(
                np.array(got.astype(mx.float32)),
                np.array(expected.astype(mx.float32)),
                f"{what}, {method}",
            )
            if got.size:
                assert calc_diff(got, exact) < 9e-4, what
                is_same = form == "bf16" and dtype == mx.bfloat16
                assert mx.array_equal(got, exact).item() == is_same, what


def routing_of(case, rank):
    return case.expert_ids[rank], case.gates[rank]


def tokens_of(case, rank, dtype):
    values = np.random.default_rng(17 + rank).normal(size=(case.tokens[rank], D))
    return mx.array(values.astype(np.float32)).astype(dtype)


def check_bytes(comm, placement, case, dtype, form):
    """What goes through the transport is what `traffic` says, and less than before."""
    from mlx_ep import EPConfig
    from mlx_ep.exchange import (
        STRATEGIES,
        ExchangeShape,
        moe_combine_exchange,
        moe_dispatch_exchange,
    )
    from mlx_ep.experts import run_experts
    from mlx_ep.metrics import Counters
    from mlx_ep.types import Routing, TokenCounts

    x = tokens_of(case, comm.rank, dtype)
    routing = Routing(*map(mx.array, routing_of(case, comm.rank)))
    tokens, recording = TokenCounts(case.tokens), Recording(comm)
    for name, settings in configs().items():
        if "rounds" in name:
            continue
        config = EPConfig(**settings, dispatch_dtype=form)
        strategy = STRATEGIES.create(config)
        recording.calls.clear()
        rows, handle = moe_dispatch_exchange(
            x,
            routing,
            placement,
            recording.comm,
            strategy,
            tokens=tokens,
            dispatch_dtype=form,
        )
        runner = runner_of(placement, comm.rank)
        partial = run_experts(rows, runner, Counters())
        mx.eval(moe_combine_exchange(partial, handle))
        shape = ExchangeShape(
            tokens=tokens,
            width=D,
            top_k=K,
            itemsize=x.itemsize,
            rank=comm.rank,
            transport=comm.transport,
            dispatch_dtype=form,
            **rows_between(case, placement, comm.rank),
        )
        expected = [tuple(c) for c in strategy.traffic(shape).collectives]
        assert recording.calls == expected, f"{name}, {case.name}, {dtype}, {form}"


def check_model(group):
    """A model says the same with every strategy, and nearly what it said before."""
    import mlx_ep
    from mlx_ep import EPConfig
    from tests.support import tiny

    tokens = mx.array([[5, 9, 200, 31, 7]])

    def logits(strategy, form):
        config = EPConfig(strategy=strategy, dispatch_dtype=form, warmup=False)
        model = tiny.make_model(tiny.QWEN3_MOE)
        return mlx_ep.parallelize(model, group, config)(tokens)

    exact = logits("normal", "model")
    for form in ("int8", "mxfp8"):
        by_strategy = [logits(s, form) for s in ("gathered", "normal", "auto")]
        for found in by_strategy:
            assert mx.allclose(found, by_strategy[0], rtol=0, atol=1e-5)
        assert 1e-8 < calc_diff(by_strategy[0], exact) < 5e-3


def check_all(group, names):
    from mlx_ep import Placement
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    placement = Placement(
        tuple(tuple(range(r, E, comm.size)) for r in range(comm.size))
    )
    for case in routing_cases(comm.size, E, K):
        if case.name not in names:
            continue
        for dtype in DTYPES:
            for form in ("bf16", "int8", "mxfp8"):
                check_sums(comm, placement, case, dtype, form)
                check_bytes(comm, placement, case, dtype, form)
    if comm.size == 2:
        check_model(group)
    comm.barrier()


@pytest.mark.parametrize(
    ("transport", "num_ranks", "names"),
    [
        pytest.param("ring", 1, CASES[:2], id="one"),
        # The fast ones over MPI share the cases.
        pytest.param("mpi", 2, CASES[2:], id="mpi-2", marks=MPI),
        pytest.param("mpi", 3, CASES[:2], id="mpi-3", marks=MPI),
        pytest.param("mpi", 2, CASES[:2], id="mpi-2-rest", marks=[MPI, SLOW]),
        pytest.param("mpi", 4, CASES, id="mpi-4", marks=[MPI, SLOW]),
        pytest.param("ring", 2, CASES[:2], id="ring-2", marks=SLOW),
        pytest.param("ring", 3, CASES[:2], id="ring-3", marks=SLOW),
    ],
)
def test_rows_in_another_dtype(transport, num_ranks, names):
    run_ranks(num_ranks, check_all, names, transport=transport)
