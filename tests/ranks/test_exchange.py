"""Every strategy on real ranks, every routing, against the float64 reference.

Starting ranks takes seconds, so one run makes all checks of one number of ranks; what
fails raises on its rank with the name of the case in the message. Hence one file, a
little over 400 lines.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support.cases import make_case, routing_cases
from tests.support.fuzz_exchange import fuzz
from tests.support.ranks import RanksError, run_ranks
from tests.support.reference import moe_sum

pytestmark = pytest.mark.requires("ranks")

MPI = pytest.mark.requires("mpi")
D, E, K = 6, 7, 3
DTYPES = ("float32", "float16", "bfloat16")
# Rounding of one number to each dtype, relative.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def configs():
    from mlx_ep import EPConfig

    small = {"low_latency_tokens": 4, "round_tokens": 4}
    return {
        "gathered": EPConfig(strategy="gathered"),
        "gathered in rounds": EPConfig(strategy="gathered", **small),
        "low_latency": EPConfig(strategy="low_latency"),
        "normal": EPConfig(strategy="normal"),
        "normal in rounds": EPConfig(strategy="normal", **small),
        "float32 sums": EPConfig(strategy="low_latency", sums="float32"),
        "float32 sums, normal": EPConfig(strategy="normal", sums="float32"),
        "all_to_all": EPConfig(strategy="deepep", **small),
        "auto": EPConfig(strategy="auto", **small),
    }


def matrices(num_experts=E, width=D):
    random = np.random.default_rng(5)
    shape = (num_experts, width, width)
    return random.normal(size=shape, scale=width**-0.5).astype(np.float32)


def placement_of(num_ranks, num_experts=E):
    """Experts dealt out in turn: slots are not in the order of the experts."""
    from mlx_ep import Placement

    return Placement(
        tuple(tuple(range(r, num_experts, num_ranks)) for r in range(num_ranks))
    )


def runner_of(placement, rank, weights):
    """Experts as plain matrices, in float32: the exchange is what is tested."""
    own = weights[list(placement.rank_experts[rank])]

    def run(rows, slots):
        x = np.array(rows.astype(mx.float32))
        return mx.array(np.einsum("nd,nde->ne", x, own[np.array(slots)]))

    return run


def tokens_of(num_tokens, rank, dtype, width=D):
    random = np.random.default_rng(17 + rank)
    x = mx.array(random.normal(size=(num_tokens, width)).astype(np.float32))
    return x.astype(getattr(mx, dtype))


def expected_of(x, ids, gates, weights):
    experts = [lambda row, w=w: row @ np.asarray(w, np.float64) for w in weights]
    return moe_sum(np.array(x.astype(mx.float32)), ids, gates, experts)


def tolerance(dtype, num_ranks):
    """Values here are below 10: P sums are rounded once, the rest is float32."""
    return 10 * max(num_ranks * EPSILON[dtype] / 2, 8 * EPSILON["float32"])


def group_of(comm, config, placement=None):
    from mlx_ep.moe import ExpertGroup

    placement = placement or placement_of(comm.size)
    return ExpertGroup.from_config(comm, placement, config)


def inputs_of(case, rank, dtype):
    from mlx_ep.types import Routing

    x = tokens_of(case.tokens[rank], rank, dtype)
    ids, gates = case.expert_ids[rank], case.gates[rank]
    return x, Routing(mx.array(ids), mx.array(gates)), ids, gates


def check_strategy(comm, name, config, cases, dtypes):
    group, weights = group_of(comm, config), matrices()
    runner = runner_of(group.placement, comm.rank, weights)
    is_exact = config.strategy == "gathered" or config.sums == "float32"
    for dtype in dtypes:
        for case in cases:
            x, routing, ids, gates = inputs_of(case, comm.rank, dtype)
            what = f"{name}, {case.name}, {dtype}"
            got = group.weighted_sum(x, routing, runner)
            assert (got.dtype, got.shape) == (mx.float32, x.shape), what
            np.testing.assert_allclose(
                np.array(got),
                expected_of(x, ids, gates, weights),
                rtol=0,
                atol=tolerance("float32" if is_exact else dtype, comm.size),
                err_msg=what,
            )
            if dtype == dtypes[-1]:
                again = group.weighted_sum(x, routing, runner)
                np.testing.assert_array_equal(np.array(got), np.array(again), what)


def check_agreed(comm, case):
    """Token counts that are agreed on once save a collective in every layer."""
    for name, config in configs().items():
        group, weights = group_of(comm, config), matrices()
        runner = runner_of(group.placement, comm.rank, weights)
        x, routing, *_ = inputs_of(case, comm.rank, "float32")
        apart = np.array(group.weighted_sum(x, routing, runner))
        num_collectives = group.counters.collectives
        group.counters.reset()
        with group.agreed(x.shape[0]) as tokens:
            assert tokens.per_rank == case.tokens
            agreed = np.array(group.weighted_sum(x, routing, runner))
            once = group.counters.collectives
            np.array(group.weighted_sum(x, routing, runner))
            assert group.counters.collectives - once == once - 1, name
        np.testing.assert_array_equal(apart, agreed)
        is_low_latency = config.mode == "low_latency"
        assert once == num_collectives + is_low_latency, name
        longer = [mx.concatenate([a, mx.zeros_like(a[:1])]) for a in (x, *routing)]
        message = "Agree on them again in each step"
        with group.agreed(x.shape[0]), pytest.raises(ValueError, match=message):
            group.weighted_sum(longer[0], type(routing)(*longer[1:]), runner)


class Recording:
    """The collectives that go through a `CountedComm`, by name and bytes."""

    def __init__(self, comm):
        from mlx_ep.exchange import CountedComm
        from mlx_ep.metrics import Counters

        self.calls = []
        self.comm = CountedComm(comm, Counters())
        self.comm.record = lambda name, x: self.calls.append((name, x.nbytes))


def check_handles(comm, case, dtype):
    """By hand: dispatch, experts, combine; again through the handle; and `traffic`."""
    from mlx_ep.exchange import (
        STRATEGIES,
        ExchangeShape,
        moe_combine_exchange,
        moe_dispatch_exchange,
    )
    from mlx_ep.experts import run_experts
    from mlx_ep.metrics import Counters
    from mlx_ep.types import TokenCounts

    placement, weights = placement_of(comm.size), matrices()
    runner = runner_of(placement, comm.rank, weights)
    x, routing, ids, gates = inputs_of(case, comm.rank, dtype)
    tokens = TokenCounts(case.tokens)
    rows_to, rows_from = rows_between(case, placement, comm.rank)
    for name, config in configs().items():
        if "rounds" in name or (name == "low_latency" and tokens.largest > 64):
            continue
        strategy, recording = STRATEGIES.create(config), Recording(comm)
        what = f"{name}, {case.name}, {dtype}"
        sum_dtype = mx.float32 if config.sums == "float32" else None
        rows, handle = moe_dispatch_exchange(
            x,
            routing,
            placement,
            recording.comm,
            strategy,
            tokens=tokens,
            sum_dtype=sum_dtype,
        )
        partial = run_experts(rows, runner, Counters())
        first = moe_combine_exchange(partial, handle)
        mx.eval(first)
        shape = ExchangeShape(
            tokens=tokens,
            width=D,
            top_k=K,
            itemsize=x.itemsize,
            sum_itemsize=4 if sum_dtype else None,
            rank=comm.rank,
            rows_to=rows_to,
            rows_from=rows_from,
            transport=comm.transport,
        )
        traffic = strategy.traffic(shape)
        assert recording.calls == [tuple(c) for c in traffic.collectives], what
        assert traffic.num_bytes == sum(size for _, size in recording.calls)

        recording.calls.clear()
        other = (2 * x).astype(x.dtype)
        rows, handle = moe_dispatch_exchange(
            other, routing, placement, recording.comm, strategy, handle=handle
        )
        second = moe_combine_exchange(run_experts(rows, runner, Counters()), handle)
        mx.eval(second)
        if traffic.host_syncs:  # its counts are known: only rows travel
            again = [tuple(c) for c in traffic.collectives[1:]]
            assert recording.calls == again, what
        np.testing.assert_allclose(
            np.array(second),
            expected_of(other, ids, gates, weights),
            rtol=0,
            atol=2 * tolerance(dtype, comm.size),
            err_msg=what,
        )
        np.testing.assert_array_equal(2 * np.array(first), np.array(second), what)


def rows_between(case, placement, rank):
    """Rows from this rank to each rank, and from each rank to it."""

    def count(ids, owner):
        held = np.isin(ids, placement.rank_experts[owner]) & (ids >= 0)
        return int(held.any(axis=1).sum())

    ranks = range(placement.num_ranks)
    return (
        tuple(count(case.expert_ids[rank], peer) for peer in ranks),
        tuple(count(case.expert_ids[peer], rank) for peer in ranks),
    )


def check_split_buffers(comm):
    """Above `JOIN_BYTES` tokens and routing travel apart, also on a rank of no use."""
    from mlx_ep import EPConfig
    from mlx_ep.exchange.gathered import JOIN_BYTES

    width, top_k = 4096, 2
    num_tokens = JOIN_BYTES // (4 * width) + 1
    weights = np.ones((2, width), np.float32) * np.array([[1.0], [2.0]], np.float32)
    placement = placement_of(comm.size, 2)
    own = weights[list(placement.rank_experts[comm.rank])]

    def run(rows, slots):
        return mx.array(np.array(rows) * own[np.array(slots)])

    ids = np.zeros((num_tokens, top_k), np.int32)  # rank 1 and on compute nothing
    case = make_case("all to rank 0", [ids] * comm.size)
    from mlx_ep.types import Routing

    x = tokens_of(num_tokens, comm.rank, "float32", width)
    gates = case.gates[comm.rank]
    routing = Routing(mx.array(ids), mx.array(gates))
    for strategy in ("gathered", "low_latency"):
        config = EPConfig(strategy=strategy, low_latency_tokens=num_tokens)
        got = group_of(comm, config, placement).weighted_sum(x, routing, run)
        expected = np.array(x) * gates.sum(axis=1)[:, None]
        np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)


def check_slot_outputs(comm, case):
    """K outputs per token, on ranks with tokens of their own."""
    from mlx_ep import EPConfig

    group, weights = group_of(comm, EPConfig(strategy="auto")), matrices()
    runner = runner_of(group.placement, comm.rank, weights)
    x, routing, ids, _ = inputs_of(case, comm.rank, "float32")
    got = np.array(group.slot_outputs(x, routing, runner))
    expected = np.einsum("td,tkde->tke", np.array(x), weights[ids])
    expected[ids < 0] = 0
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def check_capacity(comm):
    """Beyond the capacity a pair adds 0 on every strategy, and is counted."""
    from mlx_ep import EPConfig

    # Choice-major: expert 0 is full after (t0,k0) (t1,k0), expert 1 after (t0,k1) ..
    ids = np.array([[0, 1, 2], [0, 1, 0], [3, 1, 0], [-1, -1, 0]], np.int32)
    kept = np.array([[0, 1, 2], [0, 1, -1], [3, -1, -1], [-1, -1, -1]], np.int32)
    case = make_case("capacity", [ids] * comm.size, 21)
    weights = matrices()
    for strategy in ("replicated", "gathered", "low_latency", "normal", "auto"):
        config = EPConfig(strategy=strategy, capacity=2)
        group = group_of(comm, config)
        runner = runner_of(group.placement, comm.rank, weights)
        # `replicated` takes the same tokens on every rank.
        home = 0 if strategy == "replicated" else comm.rank
        x, routing, _, gates = inputs_of(case, home, "float32")
        with pytest.warns(UserWarning, match="drops 4 of 12 .* capacity=2"):
            got = group.weighted_sum(x, routing, runner)
        np.testing.assert_allclose(
            np.array(got),
            expected_of(x, kept, gates, weights),
            rtol=0,
            atol=tolerance("float32", comm.size),
            err_msg=strategy,
        )
        np.array(group.weighted_sum(x, routing, runner))  # said once
        assert group.step.dropped_pairs == 8


def check_too_many(comm):
    """More tokens than low_latency takes: an error there, rounds in `auto`."""
    from mlx_ep import EPConfig

    many = [np.zeros((9, K), np.int32)] * comm.size
    case = make_case("many", many)
    x, routing, ids, gates = inputs_of(case, comm.rank, "float32")
    settings = {"low_latency_tokens": 4, "round_tokens": 4}
    weights = matrices()
    group = group_of(comm, EPConfig(strategy="low_latency", **settings))
    runner = runner_of(group.placement, comm.rank, weights)
    message = r"at most 4 tokens of a rank \(low_latency_tokens=4\); got 9.*--low-lat"
    with pytest.raises(ValueError, match=message):
        group.weighted_sum(x, routing, runner)
    group = group_of(comm, EPConfig(strategy="auto", **settings))
    got = group.weighted_sum(x, routing, runner)
    expected = expected_of(x, ids, gates, weights)
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)


def check_all(group, transport, small):
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    cases = routing_cases(comm.size, E, K)
    by_name = {case.name: case for case in cases}
    dtypes = DTYPES
    if small:
        names = ("uneven T", "no tokens on rank 0", "all to the last rank")
        cases, dtypes = [by_name[name] for name in names], ("bfloat16",)
    for name, config in configs().items():
        is_variant = "rounds" in name or "sums" in name
        check_strategy(comm, name, config, cases, dtypes[-1:] if is_variant else dtypes)
    handled = [by_name["uneven T"], by_name["all to rank 0"], by_name["distinct"]]
    for case in handled[: 1 if small else None]:
        for dtype in dtypes:
            check_handles(comm, case, dtype)
    check_too_many(comm)
    check_capacity(comm)
    check_split_buffers(comm)
    if not small:
        check_slot_outputs(comm, by_name["some without expert"])
        check_agreed(comm, by_name["uneven T"])
        check_replicated(comm)
    comm.barrier()


def check_replicated(comm):
    """The same tokens on every rank."""
    from mlx_ep import EPConfig

    expert_group, weights = group_of(comm, EPConfig()), matrices()
    runner = runner_of(expert_group.placement, comm.rank, weights)
    for dtype in DTYPES:
        for case in routing_cases(1, E, K):
            x, routing, ids, gates = inputs_of(case, 0, dtype)
            got = np.array(expert_group.weighted_sum(x, routing, runner))
            again = np.array(expert_group.weighted_sum(x, routing, runner))
            expected = expected_of(x, ids, gates, weights)
            atol = tolerance("float32", comm.size)
            np.testing.assert_allclose(got, expected, 0, atol, err_msg=case.name)
            np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize(
    ("transport", "num_ranks", "small"),
    [
        pytest.param("ring", 1, False, id="one"),
        # Fast: 2 ranks have `ring-2` and `test_fuzzing`, MPI has all cases on 4.
        pytest.param("mpi", 2, False, id="mpi-2", marks=[MPI, pytest.mark.slow]),
        pytest.param("mpi", 3, False, id="mpi-3", marks=[MPI, pytest.mark.slow]),
        pytest.param("mpi", 4, False, id="mpi-4", marks=MPI),
        pytest.param("ring", 2, True, id="ring-2"),
        pytest.param("ring", 3, True, id="ring-3", marks=pytest.mark.slow),
    ],
)
def test_strategies(transport, num_ranks, small):
    run_ranks(num_ranks, check_all, transport, small, transport=transport)


@pytest.mark.requires("mpi")
def test_fuzzing():
    """Few of the random exchanges that `make fuzz` runs 10,000 of."""
    run_ranks(2, fuzz, 7, 0, 150, 30.0, transport="mpi")


def test_a_hang_is_a_failure_with_the_stacks_of_every_rank():
    with pytest.raises(RanksError) as error:
        run_ranks(2, fuzz, 7, 0, 20, 2.0, 10, transport="ring")
    text = str(error.value)
    assert "fuzz_exchange.py" in text.split("--- rank 1 ---")[0]
    assert "in exchange" in text.split("--- rank 1 ---")[1]
