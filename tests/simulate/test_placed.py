"""Placements, copies and recorded routing, against what the package's functions do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_ep.cost.profile import find_profile
from mlx_ep.loading import model_shape
from mlx_ep.placement import (
    Placement,
    RecordedRouting,
    served_counts,
    write_placement,
    write_record,
)
from mlx_ep.simulate.candidates import Candidate, simulate_candidates
from mlx_ep.simulate.group import Group
from mlx_ep.simulate.model import read_model
from mlx_ep.simulate.placed import PlacedRouting, placement_of
from mlx_ep.simulate.routing import make_routing
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.traces import read_trace
from tests.support.simulate.data import (
    MOE,
    cluster,
    instance,
    make_folder,
    trace_lines,
    write_trace,
)
from tests.support.simulate.running import make_engine, run_command

# Sixteen experts on two ranks, four of them on both.
COPIES = Placement((tuple(range(10)), (0, 1, *range(8, 16))))


def _busiest(
    placement: Placement, draw: Callable[[], np.ndarray], draws: int
) -> tuple[float, float]:
    """Distinct experts and rows of the busiest rank, as `Placement.serve` has them."""
    ends = np.cumsum([len(experts) for experts in placement.rank_experts])
    found = []
    for _ in range(draws):
        ids = draw()
        slots = placement.serve(ids)
        if not placement.has_replicas:
            ranks = placement.expert_ranks[ids]
        else:
            ranks = np.searchsorted(ends, slots, side="right")
        each = range(placement.num_ranks)
        found.append(
            (
                max(len(set(slots[ranks == rank].tolist())) for rank in each),
                max(int((ranks == rank).sum()) for rank in each),
            )
        )
    distinct, pairs = np.mean(found, axis=0)
    return float(distinct), float(pairs)


def _uniform(tokens: int, experts: int = 16, top_k: int = 2) -> Any:
    random = np.random.default_rng(9)
    return lambda: np.argsort(random.random((tokens, experts)), axis=1)[
        :, :top_k
    ].astype(np.int32)


@pytest.mark.parametrize("tokens", [1, 4, 64, 65, 300])
@pytest.mark.parametrize("placement", [COPIES, Placement.contiguous(16, 4)])
def test_served_counts_are_what_is_served(placement: Placement, tokens: int) -> None:
    ids = _uniform(tokens)()
    counts = np.bincount(ids.ravel(), minlength=16)[None]
    (served,) = served_counts(placement, counts, tokens)
    assert (served.sum(axis=0) == counts[0]).all()
    slots = np.bincount(placement.serve(ids).ravel(), minlength=20)
    ends = np.cumsum([0, *map(len, placement.rank_experts)])
    for rank, experts in enumerate(placement.rank_experts):
        own = slots[ends[rank] : ends[rank + 1]] if placement.has_replicas else None
        expected = counts[0][list(experts)] if own is None else own
        assert served[rank][list(experts)].tolist() == expected.tolist()


@pytest.mark.parametrize("tokens", [1, 3, 16, 100])
def test_busiest_rank_with_copies_against_the_choice(tokens: int) -> None:
    loads = PlacedRouting(COPIES, 2).loads(tokens)
    distinct, pairs = _busiest(COPIES, _uniform(tokens), 1500 if tokens < 50 else 200)
    assert loads.distinct.max(axis=1).mean() == pytest.approx(distinct, rel=0.02)
    assert loads.pairs.max(axis=1).mean() == pytest.approx(pairs, rel=0.02)
    plain = PlacedRouting(Placement.contiguous(16, 2), 2).loads(tokens)
    fewer = loads.distinct if tokens <= 64 else loads.pairs
    more = plain.distinct if tokens <= 64 else plain.pairs
    assert fewer.max(axis=1).mean() < more.max(axis=1).mean()
    sampled = PlacedRouting(COPIES, 2, is_sampled=True, seed=1).loads(tokens)
    assert sampled.distinct.shape == (16, 2)


def _topics(tokens: int) -> Any:
    """Tokens of two topics: each takes 3 of the 4 experts of a topic, and one other."""
    random = np.random.default_rng(4)

    def draw() -> np.ndarray:
        rows = []
        for _ in range(tokens):
            topic = random.integers(4)
            own = 4 * topic + random.permutation(4)[:3]
            other = random.choice(np.delete(np.arange(16), own))
            rows.append([*own, other])
        return np.array(rows, np.int32)

    return draw


def test_recorded_experts_that_occur_together(tmp_path: Path) -> None:
    """The busiest rank of the recording, not that of experts chosen one by one."""
    both = np.zeros((2, 16, 16), np.int64)
    tokens = _topics(8000)()
    for row in tokens:
        both[:, row[:, None], row] += 1
    file = tmp_path / "routing.npz"
    write_record(file, RecordedRouting(both, 4))
    placement = Placement.contiguous(16, 2)
    routing = make_routing("TRACE", 16, 4, 2, file=file)
    for count in (1, 2, 6):
        distinct, _ = _busiest(placement, _topics(count), 1200)
        found = routing.loads(count).distinct
        assert found.max(axis=1).mean() == pytest.approx(distinct, rel=0.05)
        assert (found.sum(axis=1) <= 4 * count).all()
    # Without regard to what goes together it is 8% less for one token.
    chosen = make_routing("COPY", 16, 4, 2).loads(1).distinct.max()
    together = routing.loads(1).distinct.max(axis=1).mean()
    assert together > 1.05 * chosen
    # Copies that the recording asks for make the busiest rank less busy.
    sizes = _model(tmp_path, num_experts_per_tok=4)
    settings = EngineSettings(placement_file=str(file), replica_memory="0.0002GB")
    placed = placement_of(sizes, settings, 2)
    assert placed is not None and placed.has_replicas
    with_copies = make_routing("TRACE", 16, 4, 2, file=file, placement=placed)
    fewer = with_copies.loads(1).distinct.max(axis=1).mean()
    assert fewer < together


def _model(folder: Path, **changes: Any) -> Any:
    file = folder / "model.json"
    file.write_text(json.dumps(MOE | changes))
    return read_model("m", file)


def _group(folder: Path, *flags: str, **changes: Any) -> Group:
    one = instance(tp_size=2, ep_size=2, **changes)
    make_folder(folder, c=cluster(one))
    trace = write_trace(folder / "t.jsonl", trace_lines(3))
    return make_engine(folder / "c.json", trace, "--no-graphs", *flags).groups[0]


def _step(group: Group, tokens: int) -> int:
    batch = StepBatch(decodes=[20] * tokens)
    return int(group._times.stage_ns([batch], 1, 0).sum())


@pytest.mark.parametrize("hardware", ["TINY", "m3-ultra"])
def test_a_cluster_with_copies(hardware: str, tmp_path: Path) -> None:
    """They take memory of the KV blocks, and time from decode steps."""
    write_placement(tmp_path / "placed.json", COPIES)
    plain = _group(tmp_path, hardware=hardware)
    in_file = _group(tmp_path, hardware=hardware, expert_placement="placed.json")
    by_flag = _group(
        tmp_path, "--placement", str(tmp_path / "placed.json"), hardware=hardware
    )
    assert _step(in_file, 4) == _step(by_flag, 4) < _step(plain, 4)
    before, after = (group.instances[0].pool for group in (plain, in_file))
    # Ten experts of three matrices and all four layers instead of eight.
    expert = 4 * 3 * 64 * 32 * 2  # F of the model, bytes
    assert after.weight_bytes - before.weight_bytes == 2 * expert
    assert after.num_blocks < before.num_blocks
    memory = f"{2 * expert / 1e9:.9f}GB"
    copied = _group(tmp_path, "--replica-memory", memory, hardware=hardware)
    assert copied.instances[0].pool.weight_bytes == after.weight_bytes
    assert _step(copied, 4) < _step(plain, 4)


@pytest.mark.parametrize(
    "changes, flags, text",
    [
        ({"ep_size": 1}, ["--replica-memory", "1GB"], "ep_size is 1"),
        ({}, ["--replica-memory", "auto"], "must be a number of GB here"),
        ({}, ["--replica-memory", "much"], "must be a number of GB"),
        ({}, ["--placement", "none.json"], "none.json cannot be read"),
        ({"expert_placement": 3}, [], "expert_placement: must be a text"),
        ({"replica_memory": "-1GB"}, [], "replica_memory must be a number of GB"),
        (
            {},
            ["--replica-memory", "0.001GB", "--expert-routing-policy", "BALANCED"],
            "it must be COPY, RAND, CUSTOM or TRACE",
        ),
    ],
)
def test_wrong_placements(
    changes: dict[str, Any], flags: list[str], text: str, tmp_path: Path
) -> None:
    one = instance(tp_size=2, **({"ep_size": 2} | changes))
    make_folder(tmp_path, c=cluster(one))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(2))
    outcome = run_command(
        ["--cluster-config", tmp_path / "c.json", "--dataset", trace, *flags]
    )
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome
    assert text in outcome.err, outcome.err


def test_candidates_with_copies(tmp_path: Path) -> None:
    """What `mlx_ep.plan --simulate --replica-memory` compares: ep alone gets faster."""
    sizes = _model(tmp_path)
    trace = read_trace(write_trace(tmp_path / "t.jsonl", trace_lines(3)))

    def served(memory: str) -> dict[str, Candidate]:
        found = simulate_candidates(
            trace,
            sizes,
            model_shape(MOE, name="tiny"),
            {"m3-ultra": find_profile("m3-ultra")},
            2,
            settings=EngineSettings(replica_memory=memory),
        )
        return {one.way: one for one in found}

    plain, copied = served("0"), served("0.0001GB")
    for way, one in plain.items():
        other = copied[way]
        assert not one.why_not and not other.why_not, (one, other)
        if way.startswith("ep, --attention") and "data" not in way:
            assert other.tpot < one.tpot and other.memory > one.memory
        elif not way.startswith("ep"):
            assert other == one
