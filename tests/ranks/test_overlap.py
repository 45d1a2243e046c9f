"""`--overlap single`: the same tokens, and shared experts that do not wait."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_ep
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from tests.support import tiny
from tests.support.graphs import Graph
from tests.support.link import Link
from tests.support.ranks import run_ranks
from tests.support.waiting import LONG, until

pytestmark = pytest.mark.requires("ranks")

MODELS = {"qwen2_moe": tiny.QWEN2_MOE, "deepseek_v3": tiny.DEEPSEEK_V3}
STRATEGIES = ("replicated", "gathered", "low_latency", "normal")
PROMPT = np.random.default_rng(0).integers(2, 300, 24)


def logits_of(model, tokens):
    cache = make_prompt_cache(model)
    steps = mx.split(tokens, [21, 22, 23], axis=1)
    return np.array(mx.concatenate([model(s, cache=cache) for s in steps], 1)[0])


def both_ways(group, names, strategies):
    """On a rank: the logits of each model and strategy are those without overlap."""
    for name in names:
        for strategy in strategies:
            found = []
            for overlap in ("none", "single"):
                model = tiny.make_model(MODELS[name])
                config = EPConfig(strategy=strategy, overlap=overlap)
                mlx_ep.parallelize(model, group, config)
                # Where ranks have tokens of their own, they are not alike.
                own = np.roll(PROMPT, 0 if strategy == "replicated" else group.rank())
                found.append(logits_of(model, mx.array(own)[None]))
            np.testing.assert_array_equal(*found, err_msg=f"{name}, {strategy}")


@pytest.mark.parametrize(
    ("num_ranks", "names", "strategies"),
    [
        (2, tuple(MODELS), STRATEGIES),
        pytest.param(3, tuple(MODELS), STRATEGIES, marks=pytest.mark.slow),
        pytest.param(4, tuple(MODELS), STRATEGIES, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_the_same(num_ranks, names, strategies):
    run_ranks(num_ranks, both_ways, names, strategies)


def wait_for(path: Path) -> None:
    until(path.exists, lambda: f"{path.name} never came", LONG / 2)


def shared_first(group, folder):
    """Rank 1 joins the layer's sum only when rank 0 has its shared experts' output."""
    model = tiny.make_model(tiny.QWEN2_MOE)
    mlx_ep.parallelize(model, group, EPConfig(overlap="single"))
    block = model.layers[0].mlp
    x, seen, done = mx.random.normal((1, 8, 64)), [], Path(folder) / "done"
    mx.eval(model.parameters(), block(x))
    shared = type(block.shared_expert)
    call = shared.__call__
    shared.__call__ = lambda self, x: seen.append(call(self, x)) or seen[-1]
    if group.rank() == 1:
        wait_for(done)
    output = block(x)
    mx.async_eval(output)
    if group.rank() == 0:
        mx.eval(seen[-1])  # hangs where it is queued behind the sum
        done.touch()
    mx.eval(output)


def test_shared_experts_run_while_the_sum_is_under_way(tmp_path):
    run_ranks(2, shared_first, str(tmp_path))


COLLECTIVES = ("AllReduce", "AllGather", "ReduceScatter")


def evaluations(block, x):
    """What a block has evaluated, in order, and its shared experts' output.

    Nothing is: what the block starts is kept, so that its graph can be read.
    """
    queued, shared = [], []
    start, kind = mx.async_eval, type(block.shared_expert)
    call = kind.__call__
    mx.async_eval = lambda *arrays: queued.append(arrays)
    kind.__call__ = lambda self, x: shared.append(call(self, x)) or shared[-1]
    try:
        output = block(x)
    finally:
        mx.async_eval, kind.__call__ = start, call
    return [*queued, (output,)], shared[0]


def graph_order(group, strategy, overlap):
    """Whether all collectives are asked for before any matrix of the shared experts."""
    model = tiny.make_model(tiny.QWEN2_MOE)
    config = EPConfig(strategy=strategy, overlap=overlap, runner="gather", warmup=False)
    mlx_ep.parallelize(model, group, config)
    x = mx.random.normal((1, 8, 64), key=mx.random.key(group.rank()))
    mx.eval(model.parameters(), x)
    stages, shared = evaluations(model.layers[0].mlp, x)
    whole, beside = Graph.of(*stages[-1]), Graph.of(shared)
    matrices, collectives = beside.named("Matmul"), whole.named(*COLLECTIVES)
    assert len(matrices) == 3 and matrices < whole.named("Matmul")
    # On a CPU host experts may ask for what a dispatch brought: it is done by then.
    expected = {1} if strategy == "replicated" else {1, 2}
    assert len(collectives) in expected, (strategy, sorted(whole.labels.values()))
    # Neither needs the other.
    assert not whole.before(*collectives) & matrices
    assert not beside.named(*COLLECTIVES)
    asked = {}
    for number, arrays in enumerate(stages):
        for node in Graph.of(*arrays).labels:
            asked.setdefault(node, number)
    mx.eval(*stages[-1])
    return max(asked[c] for c in collectives) < min(asked[m] for m in matrices)


def graph_orders(group):
    found = {
        (strategy, overlap): graph_order(group, strategy, overlap)
        for strategy in ("replicated", "gathered", "low_latency")
        for overlap in ("single", "none")
    }
    # Peers wait for the exchange of ranks with tokens of their own: it always goes
    # first. Else the order is MLX's, unless something overlaps.
    expected = {key: key != ("replicated", "none") for key in found}
    assert found == expected


def test_the_graph_of_mlx_has_the_collective_first():
    run_ranks(2, graph_orders)


def seconds_through(group, num_bytes):
    comm = GroupComm(group)
    x = mx.zeros((num_bytes // 4,))
    comm.barrier()
    start = time.perf_counter()
    mx.eval(comm.all_gather(x))
    return time.perf_counter() - start


def test_a_link_has_latency_and_bandwidth():
    """Both directions at once, each at the bandwidth."""
    with Link(latency=0.05, bandwidth=20e6) as link:
        seconds = run_ranks(2, seconds_through, 2_000_000, link=link)
    assert link.num_bytes >= 2 * 2_000_000
    # Of the rank that began first: the other's bytes left after that.
    assert max(seconds) >= 0.05 + 2_000_000 / 20e6


def sleeps_through(group, num_bytes):
    """Seconds of a sum and of its processor, and what it gave."""
    comm = GroupComm(group, transport="mpi")
    x = mx.full((num_bytes // 4,), group.rank() + 1.0)
    mx.eval(x)
    comm.barrier()
    start, used = time.perf_counter(), time.process_time()
    total = comm.all_reduce(x)
    mx.eval(total)
    seconds = time.perf_counter() - start, time.process_time() - used
    return *seconds, total[0].item(), total[-1].item()


@pytest.mark.requires("mpi")
@pytest.mark.requires("host_metal")  # for its compiler
def test_a_link_over_mpi_takes_time_and_no_core():
    with Link(latency=0.2, bandwidth=20e6) as link:
        found = run_ranks(
            2, sleeps_through, 2_000_000, transport="mpi", checks_shapes=False,
            link=link,
        )  # fmt: skip
    for seconds, used, *numbers in found:
        assert seconds >= 0.2 + 2_000_000 / 20e6 > 2 * used
        assert numbers == [3.0, 3.0]
