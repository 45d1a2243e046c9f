"""A layer without stages gives, bit for bit, what it gives with them, for less."""

from __future__ import annotations

import io
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

import mlx_ep
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.experts import run
from mlx_ep.experts.switch import install_runner
from mlx_ep.metrics import Counters
from mlx_ep.models import find_moe_sites
from mlx_ep.moe import ExpertGroup
from mlx_ep.placement import Placement, everywhere
from mlx_ep.rows import Option, serving_slots
from mlx_ep.types import CompleteRouting, Routing, Rows
from tests.support import tiny


class _Comm(GroupComm):
    """One of two ranks, whose sums are its own part."""

    def __init__(self, rank: int) -> None:
        super().__init__(mx.distributed.init())
        self.number = rank

    @property
    def rank(self) -> int:
        return self.number

    @property
    def size(self) -> int:
        return 2

    def all_reduce(self, x: mx.array) -> mx.array:
        return x

    def barrier(self) -> None:
        pass


def _case(num_tokens: int) -> tuple[SwitchGLU, mx.array, mx.array, mx.array]:
    mx.random.seed(num_tokens)
    switch = SwitchGLU(64, 32, 6)
    nn.quantize(switch, group_size=32, bits=4)
    random = np.random.default_rng(num_tokens)
    ids = np.stack([random.permutation(6)[:4] for _ in range(num_tokens)])
    gates = mx.random.uniform(shape=(num_tokens, 4))
    x = mx.random.normal((num_tokens, 64))
    return switch, x, mx.array(ids.astype(np.int32)), gates


@pytest.mark.parametrize("runner", ["gather", "blas"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_one_rank_without_stages_is_as_with_them(runner: str, num_tokens: int) -> None:
    switch, x, ids, gates = _case(num_tokens)
    runs = install_runner(switch, lambda rows: Option(runner, "cpu"))
    comm = GroupComm(mx.distributed.init())
    group = ExpertGroup.from_config(comm, Placement.contiguous(6, 1), EPConfig())
    assert group.keeps_axes(num_tokens)
    axes = [a.reshape(1, num_tokens, 1, -1) for a in (x, ids, gates)]
    bare = group.weighted_sum(axes[0], CompleteRouting(*axes[1:]), runs)
    assert bare.shape == (1, num_tokens, 1, 64)
    with group.timings.measure() as timings:
        assert not group.keeps_axes(num_tokens)
        staged = group.weighted_sum(x, CompleteRouting(ids, gates), runs)
    assert timings.layer_calls == 1
    assert bare.reshape(num_tokens, 64).tolist() == staged.tolist()


@pytest.mark.parametrize("num_tokens", [1, 5, 80])
@pytest.mark.parametrize("experts", [range(6), range(3), (5, 0, 2, 3)])
def test_a_rank_of_two_computes_its_own_pairs_alone(
    num_tokens: int, experts: tuple[int, ...]
) -> None:
    """Also where both hold everything: what one serves the other does not."""
    switch, x, ids, gates = _case(num_tokens)
    other = range(6) if len(experts) == 6 else sorted({1, 3, 4, 5})
    placement = Placement((tuple(experts), tuple(other)))
    local = SwitchGLU(64, 32, len(experts))
    nn.quantize(local, group_size=32, bits=4)
    own = mx.array(list(experts))
    local.update({n: {k: v[own] for k, v in p.items()} for n, p in switch.items()})
    group = ExpertGroup.from_config(_Comm(0), placement, EPConfig())
    routing = CompleteRouting(ids, gates)
    runs = install_runner(local, lambda rows: Option("gather", "cpu"))
    bare = group.weighted_sum(x, routing, runs)
    pairs = group.counters.pairs_computed
    slots = placement.slots.local_slots(serving_slots(ids, placement), 0)
    assert pairs == (np.array(slots) >= 0).sum() < ids.size
    with group.timings.measure():
        staged = group.weighted_sum(x, routing, runs)
    assert bare.tolist() == staged.tolist()
    if num_tokens == 1:
        axes = [a[None, None] for a in (x, ids, gates)]
        kept = group.weighted_sum(axes[0], CompleteRouting(*axes[1:]), runs)
        assert kept.shape == (1, 1, 1, 64)
        assert kept.flatten().tolist() == bare.flatten().tolist()


@pytest.mark.parametrize("strategy", ["local", "auto"])
@pytest.mark.parametrize("runner", ["gather", "blas"])
def test_a_rank_apart_from_another_has_no_stages(strategy: str, runner: str) -> None:
    """It computes all pairs of its own tokens, and sums nothing over the ranks."""
    switch, x, ids, gates = _case(5)
    runs = install_runner(switch, lambda rows: Option(runner, "cpu"))
    config = EPConfig(strategy=strategy)
    group = ExpertGroup.from_config(_Comm(1), everywhere(6, 2), config)
    assert group.keeps_axes(5)
    axes = [a.reshape(5, 1, -1) for a in (x, ids, gates)]
    bare = group.weighted_sum(axes[0], CompleteRouting(*axes[1:]), runs)
    assert bare.shape == (5, 1, 64)
    plain = group.weighted_sum(x, Routing(ids, gates), runs)
    assert (group.counters.pairs_computed, group.counters.collectives) == (40, 0)
    with group.timings.measure():
        assert not group.keeps_axes(5)
        staged = group.weighted_sum(x, CompleteRouting(ids, gates), runs)
    assert bare.reshape(5, 64).tolist() == staged.tolist()
    # Routing that may have foreign ids goes by pairs, which sum in slot order.
    assert mx.allclose(plain, staged, atol=1e-5).item()


def test_stages_stay_where_something_needs_them() -> None:
    comm, placement = GroupComm(mx.distributed.init()), Placement.contiguous(6, 1)
    for config in (
        EPConfig(capacity=2),
        EPConfig(check_nan=True),
        EPConfig(strategy="gathered"),
    ):
        group = ExpertGroup.from_config(comm, placement, config)
        assert not group.keeps_axes(1)
    unordered = Placement(((0, 1, 2), (2, 0, 1)))
    apart = ExpertGroup.from_config(_Comm(1), unordered, EPConfig(strategy="local"))
    assert not apart.keeps_axes(1)
    shares = ExpertGroup.from_config(comm, placement, EPConfig(), share_routing=True)
    assert not shares.keeps_axes(1)


def test_overlap_needs_stages_for_micro_batches_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is under way was started when the layer returns."""
    switch, x, ids, gates = _case(5)
    runs = install_runner(switch, lambda rows: Option("gather", "cpu"))
    placement = Placement((tuple(range(6)), tuple(range(6))))
    started: list[mx.array] = []
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: started.extend(arrays))
    totals = {}
    for overlap in ("none", "single", "auto"):
        config = EPConfig(overlap=overlap)
        group = ExpertGroup.from_config(_Comm(0), placement, config)
        assert group.keeps_axes(1)
        started.clear()
        routing = CompleteRouting(ids, gates)
        totals[overlap] = group.weighted_sum(x, routing, runs).tolist()
        assert len(started) == (overlap == "single")
        with group.overlap.passing("single"):
            group.weighted_sum(x, routing, runs)
            assert len(started) == 1 + (overlap == "single")
        monkeypatch.setattr(group.overlap, "turns", object())
        assert not group.keeps_axes(1)
    assert totals["none"] == totals["single"] == totals["auto"]


@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_few_pairs_are_summed_as_many(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted in Python or by NumPy: the same pairs, in the same order."""
    random = np.random.default_rng(num_rows)
    ids = random.integers(-2, 5, (num_rows, 4)).clip(-1).astype(np.int32)
    gates = mx.array(random.random((num_rows, 4), np.float32))
    rows = Rows(mx.zeros((num_rows, 2)), mx.array(ids), gates)
    few, few_counters = run.own_pairs(rows, Counters()), Counters()
    run.own_pairs(rows, few_counters)
    monkeypatch.setattr(run, "FEW_PAIRS", 0)
    counters = Counters()
    many = run.own_pairs(rows, counters)
    assert counters == few_counters
    for some, others in zip(few, many, strict=True):
        assert np.array(some, np.float32).tolist() == np.array(others).tolist()
    if not len(few.rows):
        return
    found, expected = run.by_row(few, num_rows), run.by_row(many, num_rows)
    for some, others in zip(found, expected, strict=True):
        assert np.array(some, np.float32).tolist() == np.array(others).tolist()


def test_a_layer_on_one_rank_adds_two_primitives() -> None:
    """The axis of gates, which the block adds, is taken off and added again."""

    def count(block: nn.Module) -> int:
        text = io.StringIO()
        mx.export_to_dot(text, block(mx.zeros((1, 1, 64))))
        return len(re.findall(r"shape=rectangle", text.getvalue()))

    config = {**tiny.QWEN3_MOE, "hidden_size": 64}
    theirs = find_moe_sites(tiny.make_model(config))[-1].block
    model = mlx_ep.parallelize(
        tiny.make_model(config), config=EPConfig(runner="gather", warmup=False)
    )
    ours = model.expert_parallel.blocks[-1].form.holder
    assert count(ours) <= count(theirs) + 2
