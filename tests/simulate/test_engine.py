"""The engine against the plain simulator: the same CSV, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.traces import read_trace
from tests.support.simulate.data import (
    cluster,
    instance,
    make_folder,
    trace_lines,
    two_members,
    write_trace,
)
from tests.support.simulate.plain import plain_csv
from tests.support.simulate.running import csv_of, make_engine, run_command

# A pool of about so many blocks of 16 tokens, beside the weights.
_SMALL = {"mem_size": 0.0016, "mem_bw": 100, "mem_latency": 0}

CASES: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "one": (cluster(instance()), [], {}),
    "dense": (cluster(instance(model_name="tiny/dense", tp_size=2)), [], {}),
    "no async": (cluster(instance()), ["--no-async-scheduling"], {}),
    "few sequences": (cluster(instance(max_num_seqs=3)), [], {"ids": True}),
    "chunks": (
        cluster(instance(tp_size=2, ep_size=2)),
        ["--max-num-batched-tokens", "64", "--long-prefill-token-threshold", "24"],
        {"ids": True},
    ),
    "no chunks": (
        cluster(instance()),
        ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "256"],
        {},
    ),
    "preemption": (
        cluster(instance(npu_mem=_SMALL)),
        ["--no-reserve-full-isl"],
        {"gap_ns": 2e5, "ids": True},
    ),
    "preemption, no async, no ids": (
        cluster(instance(npu_mem=_SMALL)),
        ["--no-async-scheduling"],
        {"gap_ns": 2e5},
    ),
    "no prefixes": (
        cluster(instance()),
        ["--no-enable-prefix-caching", "--block-size", "8"],
        {"ids": True},
    ),
    "two that share experts": (two_members(), [], {"ids": True}),
    "two that share experts, full": (
        two_members(npu_mem=_SMALL, max_num_seqs=6), [], {"gap_ns": 2e5},
    ),
    "two by themselves": (cluster(instance(), instance()), [], {"sessions": True}),
    "sessions": (two_members(), ["--expert-routing-policy", "RR"], {"sessions": True}),
    "random experts": (
        two_members(), ["--expert-routing-policy", "RAND"], {"gap_ns": 5e7},
    ),
    "no graphs": (two_members(), ["--no-graphs"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_as_one_token_at_a_time(name: str, tmp_path: Path) -> None:
    content, flags, options = CASES[name]
    folder = make_folder(tmp_path, c=content)
    trace = write_trace(folder / "t.jsonl", trace_lines(40, **options))
    engine = make_engine(folder / "c.json", trace, *flags)
    times = [group._times for group in engine.groups]
    ours = csv_of(engine, folder / "out.csv")
    assert ours == plain_csv(engine.cluster, read_trace(trace), times)
    preempted = sum(request.preempted for request in engine.requests)
    assert bool(preempted) == ("preemption" in name)


def test_many_steps_at_once(tmp_path: Path) -> None:
    """Long outputs take few rounds of the loop, and the plain simulator agrees."""
    folder = make_folder(tmp_path, c=cluster(instance()))
    lines = trace_lines(12, outputs=(400, 900), gap_ns=1e7)
    trace = write_trace(folder / "t.jsonl", lines)
    engine = make_engine(folder / "c.json", trace)
    times = [group._times for group in engine.groups]
    text = csv_of(engine, folder / "out.csv")
    assert text == plain_csv(engine.cluster, read_trace(trace), times)
    log = engine.groups[0].log
    assert log.count > 900
    assert len(log.stretches) < 12 * 12


@pytest.mark.parametrize("name", ["one", "preemption", "two that share experts"])
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    """Every block is free again, every request has its tokens, in order of time."""
    content, flags, options = CASES[name]
    folder = make_folder(tmp_path, c=content)
    trace = write_trace(folder / "t.jsonl", trace_lines(60, **options))
    engine = make_engine(folder / "c.json", trace, *flags)
    engine.run()
    assert len(engine.requests) == 60
    for request in engine.requests:
        times = engine.times_of(request)
        assert len(times) == request.outputs
        assert times[0] > request.arrival and (np.diff(times) > 0).all()
    for group in engine.groups:
        for member in group.members:
            assert member.pool.num_used == 0
            assert not member.running and not member.waiting


def test_prefixes_save_time(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, c=cluster(instance()))
    ids = list(range(160))
    line = {"input_toks": 160, "output_toks": 2, "input_tok_ids": ids}
    lines = [line | {"arrival_time_ns": 0}, line | {"arrival_time_ns": 10**9}]
    trace = write_trace(folder / "t.jsonl", lines)
    engine = make_engine(folder / "c.json", trace)
    engine.run()
    first, second = (engine.times_of(r)[0] - r.arrival for r in engine.requests)
    assert second < first
    # All blocks but the last, of which one token has to be computed.
    assert [s.prompts for s in engine.groups[0].log.stretches if s.prompts] == [160, 16]


def test_arrivals_wait_for_the_step_after_the_next(tmp_path: Path) -> None:
    """With asynchronous scheduling the next step is fixed when one begins."""
    folder = make_folder(tmp_path, c=cluster(instance()))
    lines = [
        {"input_toks": 64, "output_toks": 40, "arrival_time_ns": 0},
        {"input_toks": 64, "output_toks": 1, "arrival_time_ns": 1_000_000},
    ]
    trace = write_trace(folder / "t.jsonl", lines)
    steps = {}
    for flag in ("--async-scheduling", "--no-async-scheduling"):
        engine = make_engine(folder / "c.json", trace, flag)
        engine.run()
        ends = engine.groups[0].log.ends
        arrived = int(np.searchsorted(ends, 1_000_000))
        steps[flag] = engine.requests[1].emitted[0] - arrived
    assert steps == {"--async-scheduling": 2, "--no-async-scheduling": 1}


def test_prefill_and_decode_instances(tmp_path: Path) -> None:
    """One makes the first token, the caches move, the other one makes the rest."""
    content = cluster(
        instance(pd_type="prefill"), instance(pd_type="decode"), link_latency=50_000
    )
    folder = make_folder(tmp_path, c=content)
    lines = [{"input_toks": 100, "output_toks": 5, "arrival_time_ns": 0}]
    trace = write_trace(folder / "t.jsonl", lines)
    engine = make_engine(folder / "c.json", trace)
    engine.run()
    prefill, decode = (group.log for group in engine.groups)
    assert prefill.count == 1 and decode.count == 4
    token_bytes = engine.cluster.instances[0].model.kv_token_bytes(2)
    moved = 50_000 + round(100 * token_bytes / 16)
    first, second = engine.times_of(engine.requests[0])[:2]
    assert first == prefill.ends[0]
    own = decode.ends[0] - (first + moved)
    assert second == decode.ends[0] and 0 < own < prefill.ends[0]


def test_pipeline_stages_overlap(tmp_path: Path) -> None:
    """Two stages serve many requests faster than one after the other would."""
    one = make_folder(tmp_path / "a", c=cluster(instance(tp_size=1, pp_size=2)))
    lines = trace_lines(40, gap_ns=1e5, outputs=(5, 30))
    trace = write_trace(one / "t.jsonl", lines)
    engine = make_engine(one / "c.json", trace)
    engine.run()
    piped = int(engine.groups[0].log.ends[-1])
    busy = sum(
        int(engine.groups[0]._times.stage_ns([batch], 1, 0).sum())
        for batch in _single_batches(engine)
    )
    assert piped > 0 and busy > 0
    assert all(len(engine.times_of(r)) == r.outputs for r in engine.requests)
    whole = make_engine(
        make_folder(tmp_path / "b", c=cluster(instance())) / "c.json", trace
    )
    whole.run()
    # A token passes both stages, but another batch is in the other one meanwhile.
    assert piped < 2 * int(whole.groups[0].log.ends[-1])


def _single_batches(engine: Simulation) -> list[Any]:
    from mlx_ep.simulate.scheduler import StepBatch

    return [
        StepBatch(decodes=[request.asked.input_tokens]) for request in engine.requests
    ]


def test_skip_prefill(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, c=cluster(instance()))
    lines = [{"input_toks": 150, "output_toks": 7, "arrival_time_ns": 0}]
    trace = write_trace(folder / "t.jsonl", lines)
    engine = make_engine(folder / "c.json", trace, "--skip-prefill")
    engine.run()
    assert sum(s.prompts * s.steps for s in engine.groups[0].log.stretches) == 0
    assert engine.groups[0].log.count == 7


@pytest.mark.parametrize(
    "policy, expected",
    [("LOAD", [0, 1, 0, 1]), ("RR", [0, 1, 0, 1]), ("CUSTOM", [1, 1, 0, 1])],
)
def test_request_routing(policy: str, expected: list[int], tmp_path: Path) -> None:
    folder = make_folder(tmp_path, c=cluster(instance(), instance()))
    line = {"input_toks": 9, "output_toks": 3}
    lines = [line | {"arrival_time_ns": i} for i in range(4)]
    trace = write_trace(folder / "t.jsonl", lines)
    (folder / "chosen.json").write_text("[1, 1, 0, 1]")
    more = ["--request-routing-file", str(folder / "chosen.json")]
    engine = make_engine(
        folder / "c.json",
        trace,
        "--request-routing-policy",
        policy,
        *(more if policy == "CUSTOM" else []),
    )
    engine.run()
    assert [request.instance for request in engine.requests] == expected


def test_random_requests_are_the_same_twice(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, c=cluster(instance(), instance()))
    trace = write_trace(folder / "t.jsonl", trace_lines(30))
    flags = ["--request-routing-policy", "RAND", "--expert-routing-policy", "RAND"]
    found = []
    for seed in ("0", "0", "1"):
        out = folder / "out.csv"
        argv = ["--cluster-config", folder / "c.json", "--dataset", trace]
        outcome = run_command([*argv, *flags, "--seed", seed, "--output", out])
        assert outcome.code == 0, outcome.err
        found.append((out.read_bytes(), outcome.out))
    assert found[0] == found[1] and found[0][0] != found[2][0]
