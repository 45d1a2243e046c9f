"""Names, the table, `auto`, traffic as numbers, and the example in the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.comm import GroupComm
from mlx_ep.config import ALIASES, EPConfig, StrategyName
from mlx_ep.config import strategies as config_module
from mlx_ep.exchange import (
    STRATEGIES,
    AllToAll,
    Auto,
    Collective,
    CountedComm,
    Exchange,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    Gathered,
    Replicated,
    Strategy,
    backend_line,
    layer_traffic,
)
from mlx_ep.exchange.base import expected_share
from mlx_ep.metrics import Counters
from mlx_ep.moe import ExpertGroup
from mlx_ep.placement import Placement
from mlx_ep.rows import Mover, MovesRows
from mlx_ep.types import Routing, TokenCounts

ROOT = Path(__file__).resolve().parents[2]


def shape_of(*tokens, top_k=8, width=64, itemsize=2, **options):
    counts = TokenCounts(tokens)
    numbers = {"width": width, "top_k": top_k, "itemsize": itemsize}
    return ExchangeShape(tokens=counts, **numbers, **options)


def test_the_table_holds_what_the_configuration_lists():
    assert tuple(STRATEGIES) == get_args(StrategyName)
    for name in STRATEGIES:
        mover = Mover()
        strategy = STRATEGIES.create(EPConfig(strategy=name), mover)
        assert isinstance(strategy, Strategy)
        assert not isinstance(strategy, MovesRows) or strategy.mover is mover
        comm = GroupComm(mx.distributed.init())
        routing = Routing(mx.zeros((2, 1), mx.int32), mx.ones((2, 1)))
        placement = Placement.contiguous(1, 1)
        request = ExchangeRequest(
            routing, placement, comm, mx.float32, TokenCounts((2,))
        )
        exchange = strategy.exchange(request)
        assert isinstance(exchange, Exchange)
        x = mx.random.normal((2, 3))
        for tokens in (x, 2 * x):  # other tokens, the same routing
            rows = exchange.dispatch(tokens)
            assert mx.array_equal(exchange.combine(rows.x[: len(rows.x)]), tokens), name


@pytest.mark.parametrize(
    ("alias", "strategy", "mode"),
    [
        ("none", "replicated", "auto"),
        ("disabled", "replicated", "auto"),
        ("local_allreduce", "replicated", "auto"),
        ("off", "replicated", "auto"),
        ("standard", "replicated", "auto"),
        ("0", "replicated", "auto"),
        ("local_all_reduce", "replicated", "auto"),
        ("tp_ep", "replicated", "auto"),
        ("vllm_tp", "replicated", "auto"),
        ("dp1", "replicated", "auto"),
        ("all_gather_reduce_scatter", "gathered", "auto"),
        ("deep_ep", "all_to_all", "auto"),
        ("allgather_reducescatter", "gathered", "auto"),
        ("ag_rs", "gathered", "auto"),
        ("naive", "gathered", "auto"),
        ("deepep", "all_to_all", "auto"),
        ("low_latency", "all_to_all", "low_latency"),
        ("normal", "all_to_all", "normal"),
        ("auto", "auto", "auto"),
    ],
)
def test_aliases_are_printed_canonically(alias, strategy, mode):
    config = EPConfig(strategy=alias)
    assert (config.strategy, config.mode) == (strategy, mode)
    assert f"strategy={strategy!r}, mode={mode!r}" in str(config)


@pytest.mark.parametrize(
    ("strategy", "ep_size", "num_ranks", "line"),
    [
        ("dp1", None, 2, "local_allreduce  TP=2  DP=1  EP=2"),
        ("naive", None, 3, "allgather_reducescatter  TP=1  DP=3  EP=3"),
        ("deep_ep", None, 4, "deepep  TP=1  DP=4  EP=4"),
        ("normal", None, 2, "deepep  TP=1  DP=2  EP=2"),
        ("auto", None, 2, "auto  TP=1  DP=2  EP=2"),
        ("replicated", 2, 4, "local_allreduce  TP=4  DP=1  EP=2"),
        ("replicated", 1, 2, "disabled  TP=2  DP=1  EP=1"),
        ("replicated", None, 1, "disabled  TP=1  DP=1  EP=1"),
    ],
)
def test_the_line_that_infinilm_prints(strategy, ep_size, num_ranks, line):
    config = EPConfig(strategy=strategy, ep_size=ep_size)
    assert backend_line(config, num_ranks) == f"MoE EP backend: {line}"


def test_the_line_of_a_pipeline_is_that_of_a_stage():
    line = "MoE EP backend: local_allreduce  TP=2  DP=1  EP=2  PP=3"
    assert backend_line(EPConfig(strategy="replicated", pp=3), 6) == line


def test_a_dense_model_has_no_backend():
    line = backend_line(EPConfig(), 2, is_dense=True)
    assert line == "MoE EP backend: disabled  TP=2  DP=1  EP=1"


def test_wrong_settings_are_said():
    with pytest.raises(
        ValueError, match=r"strategy must be one of replicated, .*'fast'"
    ):
        EPConfig(strategy="fast")
    with pytest.raises(ValueError, match="Give one of the two"):
        EPConfig(strategy="normal", mode="low_latency")
    with pytest.raises(ValueError, match="capacity must be 1 or more; got 0"):
        EPConfig(capacity=0)
    with pytest.warns(UserWarning, match="mode='normal' has no effect"):
        EPConfig(strategy="gathered", mode="normal")


def test_a_dispatch_dtype_without_rows_is_refused_by_name():
    message = "needs rows that travel .*; got strategy='replicated'"
    with pytest.raises(ValueError, match=message):
        EPConfig(dispatch_dtype="int8")
    with pytest.raises(ValueError, match="'per_slot' must be bit-identical"):
        EPConfig(strategy="auto", dispatch_dtype="bf16", reduction="per_slot")


def test_a_strategy_that_does_not_honour_a_dispatch_dtype_is_refused(monkeypatch):
    """One of somebody else, which would send rows as they are."""
    monkeypatch.setattr(STRATEGIES, "_factories", dict(STRATEGIES._factories))
    monkeypatch.setattr(config_module, "_strategies", [*config_module._strategies])
    STRATEGIES.register("mine", lambda config, mover: Replicated())
    with pytest.raises(ValueError, match="'mine' does not say that it does"):
        STRATEGIES.create(EPConfig(strategy="mine", dispatch_dtype="mxfp8"))
    assert isinstance(STRATEGIES.create(EPConfig(strategy="mine")), Replicated)


@pytest.mark.parametrize("strategy", ["gathered", "low_latency", "normal", "auto"])
def test_8_bits_a_value_are_half_the_bytes_of_16(strategy):
    """And a scale: of the rows that leave. Sums come back as they did."""
    strategy = STRATEGIES.create(EPConfig(strategy=strategy))
    options = {"width": 2048, "top_k": 8, "rows_to": (1, 40), "rows_from": (1, 30)}

    def dispatched(dtype):
        shape = shape_of(50, 40, **options, dispatch_dtype=dtype)
        *sent, back = strategy.traffic(shape).collectives
        words = 50 * 8 * 8  # ids and gates
        return sum(c.num_bytes for c in sent) - words, back

    plain, back = dispatched("model")
    assert dispatched("bf16") == (plain, back)
    for dtype in ("int8", "mxfp8"):
        assert dispatched(dtype) == (plain * (1 + 1 / 32) / 2, back)


@pytest.mark.parametrize("name", ["gathered", *ALIASES])
def test_a_taken_name_raises(name):
    with pytest.raises(ValueError, match=f"'{name}' is taken. Strategies are replicat"):
        STRATEGIES.register(name, AllToAll)


@pytest.mark.parametrize(
    ("tokens", "top_k", "transport", "expected"),
    [
        ((1,), 8, "none", "low_latency"),
        ((64, 0), 8, "mpi", "low_latency"),
        ((65, 0), 8, "mpi", "dense"),
        ((65, 0), 1, "mpi", "normal"),
        ((1, 1, 1, 1), 8, "mpi", "gathered"),
        ((1, 1, 1, 1), 1, "mpi", "gathered"),
        ((500, 0, 1, 1), 1, "mpi", "normal"),
        ((500, 0, 1, 1), 1, "jaccl", "gathered"),
        ((500, 500, 500, 500), 8, "ring", "gathered"),
    ],
)
def test_auto(tokens, top_k, transport, expected):
    auto = Auto()
    chosen = auto.choose(TokenCounts(tokens), top_k, transport)
    assert chosen is getattr(auto, expected)
    title = "low_latency with all tokens" if expected == "dense" else expected
    assert auto.explain(TokenCounts(tokens), top_k, transport).startswith(
        f"{title}, because "
    )


def test_auto_gives_its_reason():
    auto = Auto()

    def why(tokens, top_k, transport="mpi"):
        return auto.explain(TokenCounts(tokens), top_k, transport).split("because ")[1]

    assert why((64, 0), 8) == "no rank has more than 64 tokens"
    needs = "(a token needs a given rank with probability"
    assert why((65, 0), 8) == f"nearly every token needs both ranks {needs} 1 at K=8)"
    assert "more than 64 tokens, and not all need both" in why((65, 0), 1)
    assert f"at least half of the ranks {needs} 0.9 at" in why((1,) * 4, 8)
    assert why((500, 0, 1, 1), 1, "jaccl") == "jaccl moves buffers of fixed shapes only"
    assert f"less than half of the ranks {needs} 0.25 at K=1" in why((500, 0, 1, 1), 1)


def test_one_mover_serves_all_modes():
    """A policy sets it once, whatever is chosen later."""
    auto, both = Auto(), AllToAll()
    assert isinstance(auto, MovesRows) and isinstance(both, MovesRows)
    for part in (auto.low_latency, auto.dense, auto.normal):
        assert part.mover is auto.mover
    assert both.low_latency.mover is both.normal.mover is both.mover
    # Nothing is packed or summed here where the transport reduces.
    assert not isinstance(auto.gathered, MovesRows)


def test_all_to_all_falls_over_to_rounds():
    strategy = AllToAll(EPConfig(low_latency_tokens=4, round_tokens=8))
    assert strategy.choose(TokenCounts((4, 1))) is strategy.low_latency
    assert strategy.choose(TokenCounts((5, 1))) is strategy.normal
    rounds = layer_traffic(strategy, shape_of(17, 2))
    parts = [strategy.traffic(shape_of(*t)) for t in ((8, 2), (8, 0), (1, 0))]
    assert rounds.collectives == tuple(c for part in parts for c in part.collectives)
    assert rounds.num_bytes == sum(part.num_bytes for part in parts)
    assert rounds.host_syncs == 2  # the last round is small enough without


def test_buffers_do_not_grow_with_the_tokens():
    strategy = STRATEGIES.create(EPConfig(strategy="normal", round_tokens=32))
    for num_tokens in (32, 320, 3200):
        traffic = layer_traffic(strategy, shape_of(num_tokens, num_tokens))
        assert max(c.num_bytes for c in traffic.collectives) <= 32 * 64 * 2
        assert len(traffic.collectives) == 3 * num_tokens // 32


@pytest.mark.parametrize("strategy", ["gathered", "normal", "auto"])
def test_memory_is_constant_while_tokens_grow(strategy):
    """Beyond the result, which is held twice while the rounds are joined."""

    def peak(num_tokens, round_tokens):
        config = EPConfig(strategy=strategy, round_tokens=round_tokens)
        comm = GroupComm(mx.distributed.init())
        group = ExpertGroup.from_config(comm, Placement.contiguous(4, 1), config)
        x = mx.random.normal((num_tokens, 128))
        ids = mx.random.randint(0, 4, (num_tokens, 4)).astype(mx.int32)
        routing = Routing(ids, mx.ones(ids.shape))
        mx.eval(x, routing)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        result = group.weighted_sum(x, routing, lambda rows, slots: rows * 2)
        mx.eval(result)
        return mx.get_peak_memory() - before - 2 * result.nbytes

    bound = 64 * 128 * 4 * 20  # a round: 4 slots a token, in and out, and some
    assert max(peak(num_tokens, 64) for num_tokens in (256, 1024, 4096)) < bound
    assert peak(4096, 4096) > 10 * bound


def test_the_steps_run_beside_their_collectives():
    """On a CPU host; and what comes after them runs where it did."""
    comm = GroupComm(mx.distributed.init())
    before = mx.default_stream(mx.cpu)
    with comm.beside():
        inside = mx.default_stream(mx.cpu)
    assert inside != before == mx.default_stream(mx.cpu)
    seen = []

    class Watched(CountedComm):
        def record(self, operation, x):
            seen.append(mx.default_stream(mx.cpu))

    for name in ("gathered", "all_to_all", "normal"):
        strategy = STRATEGIES.create(EPConfig(strategy=name))
        routing = Routing(mx.zeros((2, 1), mx.int32), mx.ones((2, 1)))
        request = ExchangeRequest(
            routing,
            Placement.contiguous(1, 1),
            Watched(comm, Counters()),
            mx.float32,
            TokenCounts((2,)),
        )
        exchange = strategy.exchange(request)
        exchange.combine(exchange.dispatch(mx.ones((2, 4))).x[:2])
    assert seen and all(stream == inside for stream in seen)
    assert mx.default_stream(mx.cpu) == before


def test_traffic_by_hand():
    shape = shape_of(3, 1, rows_to=(2, 2), rows_from=(2, 1))
    replicated = Replicated().traffic(shape)
    assert replicated == ExchangeTraffic((Collective("all_reduce", 4 * 3 * 64),), 3)
    gathered = Gathered().traffic(shape)
    # 3 padded tokens of 128 bytes with 8 ids and 8 gates; 2 x 3 sums in float32
    assert gathered.collectives == (
        Collective("all_gather", 3 * (128 + 64)),
        Collective("reduce_scatter", 2 * 3 * 256),
    )
    normal = STRATEGIES.create(EPConfig(strategy="normal")).traffic(shape)
    # everybody's routing; then 2 rows one way and 1 the other, padded to 2
    assert normal.collectives == (
        Collective("all_gather", 3 * 64),
        Collective("all_gather", 2 * 128),
        Collective("all_gather", 2 * 128),
    )
    assert (normal.num_rows, normal.host_syncs) == (3 + 2, 1)


def test_rows_per_token_beside_one_row_per_expert():
    """At K=8: 4.0 times fewer on 2 ranks, 2.2 times on 4."""
    assert 8 / (2 * expected_share(8, 2)) == pytest.approx(4.0, abs=0.05)
    assert 8 / (4 * expected_share(8, 4)) == pytest.approx(2.2, abs=0.05)


def test_layer_traffic_wants_an_estimate():
    with pytest.raises(ValueError, match="rows_to and rows_from must be None"):
        layer_traffic(Auto(), shape_of(3, 1, rows_to=(2, 2), rows_from=(2, 1)))


def example() -> dict[str, object]:
    """The names that the code blocks of the page define."""
    text = (ROOT / "docs" / "add-a-strategy.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {"__name__": __name__}  # its imports are the page's own
    for block in blocks:
        exec(block, names)
    return names


class Solo(CountedComm):
    """A group of one that keeps what goes through it."""

    def __init__(self):
        super().__init__(GroupComm(mx.distributed.init()), Counters())
        self.calls = []

    def record(self, operation, x):
        self.calls.append(Collective(operation, x.nbytes))


def test_the_documented_strategy_works(monkeypatch):
    monkeypatch.setattr(STRATEGIES, "_factories", dict(STRATEGIES._factories))
    monkeypatch.setattr(config_module, "_strategies", [*config_module._strategies])
    with pytest.raises(ValueError, match="got 'broadcast'"):
        EPConfig(strategy="broadcast")
    names = example()
    strategy = STRATEGIES.create(EPConfig(strategy="broadcast"))
    assert type(strategy) is names["Broadcast"]
    assert isinstance(strategy, Strategy)
    with pytest.raises(ValueError, match="'broadcast' is taken"):
        STRATEGIES.register("broadcast", names["Broadcast"])
    comm = Solo()
    group = ExpertGroup(comm, Placement.contiguous(3, 1), strategy, Counters())
    x = mx.random.normal((4, 5))
    ids = mx.array([[0, 1], [2, 2], [-1, 0], [1, -1]], mx.int32)
    gates = mx.random.uniform(shape=(4, 2))

    def run(rows, slots):
        return rows * (slots[:, None] + 1)

    got = group.weighted_sum(x, Routing(ids, gates), run)
    scale = (np.array(gates) * (np.array(ids) + 1)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(got), np.array(x) * scale, rtol=1e-6)
    comm.calls.pop(0)  # the agreement on T
    shape = shape_of(4, top_k=2, width=5, itemsize=4)
    assert tuple(comm.calls) == strategy.traffic(shape).collectives
    assert len(
        re.findall(r"^    def", (ROOT / "docs/add-a-strategy.md").read_text(), re.M)
    )


@pytest.mark.parametrize("strategy", ["replicated", "gathered"])
def test_a_capacity_holds_for_unweighted_outputs_too(strategy):
    comm = GroupComm(mx.distributed.init())
    config = EPConfig(strategy=strategy, capacity=1)
    group = ExpertGroup.from_config(comm, Placement.contiguous(2, 1), config)
    routing = Routing(mx.array([[0, 1], [1, 0]], mx.int32), mx.ones((2, 2)))
    x = mx.ones((2, 3))
    with pytest.warns(UserWarning, match="drops 2 of 4"):
        outputs = group.slot_outputs(x, routing, lambda rows, slots: rows)
    assert outputs.shape == (2, 2, 3)
    assert outputs[..., 0].tolist() == [[1, 0], [1, 0]]
    assert group.step.dropped_pairs == 2
