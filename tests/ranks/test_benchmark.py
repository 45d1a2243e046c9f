"""`mlx_ep.benchmark` on real ranks: arms that agree, records, refusals, timings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.ranks import run_commands, run_ranks
from tests.support.usage import outcomes_of

pytestmark = pytest.mark.requires("ranks")

COMMAND = [sys.executable, "-m", "mlx_ep.benchmark"]
TINY = ["--shape", "8,128,64,2", "--group-size", "32"]
FIELDS = {
    "level", "arm", "shape", "ranks", "transport", "tokens", "context", "batch",
    "phase", "runner", "seconds_median", "seconds_quartiles", "samples", "collectives",
    "bytes", "distinct_busiest", "communication_share", "memory_bytes", "stages",
}  # fmt: skip
LAYER_ARMS = ("single", "tp", "ep-replicated", "ep-gathered", "ep-all-to-all")


def plan_of(**changes):
    from mlx_ep.benchmark.layer import LayerRun
    from mlx_ep.benchmark.samples import Budget
    from mlx_ep.benchmark.shapes import make_shape, make_weights

    weights = make_weights("affine", 4, 32, "float32")
    values = {
        "shape": make_shape("8,128,64,2", 1, weights),
        "weights": weights,
        "arms": LAYER_ARMS,
        "runners": ("gather", "blas"),
        "tokens": (1, 5),
        "budget": Budget(0.0, 2),
        "legacy": True,
    }
    return LayerRun(**values | changes)


def build(group, plan):
    from mlx_ep.benchmark.arms import build_arms
    from mlx_ep.benchmark.tokens import TokenSource
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    source = TokenSource(plan.shape, plan.weights.mlx_dtype)
    names, runners = list(plan.arms), list(plan.runners)
    arms = build_arms(names, runners, plan.shape, plan.weights, source.router, comm)
    return comm, source, arms


def measure_all(group):
    from mlx_ep.benchmark.layer import measure_layer
    from mlx_ep.comm import GroupComm

    return measure_layer(plan_of(), GroupComm(group), lambda records: None)


def find_wrong_arm(group):
    """An arm whose weights are not those of the others stops the benchmark."""
    from mlx_ep.benchmark.layer import MeasuredPoint

    plan = plan_of(arms=("tp", "ep-replicated"), runners=("gather",))
    comm, source, arms = build(group, plan)
    if comm.rank == 1:
        arms[1].block.switch_mlp.down_proj.scales *= 1.01
    with pytest.raises(RuntimeError, match=r"ep-replicated .*differs from arm tp"):
        MeasuredPoint(plan, comm, arms, source, 4).records()


def timings_change_nothing(group):
    """On or off: the same bits; every stage has its time, and they make up the call."""
    import time

    plan = plan_of(
        arms=("ep-replicated", "ep-gathered", "ep-all-to-all"), runners=("gather",)
    )
    comm, source, arms = build(group, plan)
    found = {}
    for arm in arms:
        for num_tokens in (3, 200):
            arm.agree(num_tokens)
            x = source.tokens(source.expert_ids(num_tokens, 0), 0)
            x = x[arm.part(num_tokens)]
            off = np.array(arm.run(x))
            calls = []
            for _ in range(10):
                with arm.group.timings.measure() as timings:
                    comm.barrier()
                    start = time.perf_counter()
                    timings.start()
                    on = arm.run(x)
                    total = time.perf_counter() - start
                assert np.array_equal(off, np.array(on)), arm.name
                assert timings.layer_calls == 1
                seconds = dict(timings.seconds)
                calls.append((seconds, total))
            found[arm.name, num_tokens] = calls
            assert np.array_equal(off, np.array(arm.run(x))), "and off again"
            assert timings.seconds == seconds
    return found


def check_all(group):
    find_wrong_arm(group)
    return measure_all(group), timings_change_nothing(group)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, check_all, timeout=240)


def test_records_of_all_arms(two_ranks):
    """That they exist shows that the arms agreed: it is checked before timing."""
    records = two_ranks[0][0]
    assert [r["tokens"] for r in records] == [1] * 8 + [5] * 8
    runs = [(r["arm"], r["runner"]) for r in records[:8]]
    ours = [(a, r) for r in ("gather", "blas") for a in LAYER_ARMS[2:]]
    assert runs == [("single", "gather"), ("tp", "gather"), *ours]
    for record in records:
        assert set(record) >= FIELDS and json.dumps(record)
        assert record["samples"] == 2 == len(record["seconds"])
        low, high = record["seconds_quartiles"]
        assert 0 < low <= record["seconds_median"] <= high
        assert record["memory_bytes"] > 0
        legacy = record["legacy_3158"]
        assert legacy["tp"] == pytest.approx(2 * legacy["shard"] + legacy["all_sum"])
        assert legacy["ratio"] == pytest.approx(
            (legacy["exchange"] + legacy["full"]) / legacy["tp"]
        )
    # What all ranks report is what rank 0 does, and the slowest rank counts.
    assert records == two_ranks[1][0]


def test_columns_by_hand(two_ranks):
    by_arm = {(r["arm"], r["runner"], r["tokens"]): r for r in two_ranks[0][0]}
    for num_tokens in (1, 5):
        single = by_arm["single", "gather", num_tokens]
        tp = by_arm["tp", "gather", num_tokens]
        ours = by_arm["ep-replicated", "blas", num_tokens]
        assert (single["collectives"], single["bytes"]) == (0, 0)
        # One all_sum each of [T, D] float32.
        for record in (tp, ours):
            assert record["collectives"] == 1
            assert record["bytes"] == num_tokens * 128 * 4
        assert by_arm["ep-gathered", "gather", num_tokens]["collectives"] == 2
        assert tp["distinct_busiest"] == single["distinct_busiest"] / 2
        assert tp["distinct_busiest"] <= ours["distinct_busiest"]
        assert ours["distinct_busiest"] <= min(4, single["distinct_busiest"])
        assert tp["ratio_to_tp"] == 1
        assert single["stages"]["wait"] == single["stages"]["combine"] == 0
        assert tp["stages"]["combine"] > 0
    one = 3 * 128 * 64 * (0.5 + 8 / 32)  # 4 bits, and two float32 for 32 weights
    assert by_arm["single", "gather", 1]["memory_bytes"] >= 8 * one
    assert 4 * one <= by_arm["tp", "gather", 1]["memory_bytes"] < 8 * one
    assert 4 * one <= by_arm["ep-replicated", "gather", 1]["memory_bytes"] < 8 * one


def test_stages_make_up_the_layer(two_ranks):
    for _, found in two_ranks:
        for (arm, num_tokens), calls in found.items():
            for seconds, total in calls:
                stages = ("route", "assign", "experts", "wait", "combine")
                assert all(seconds[stage] > 0 for stage in stages)
                # Neither more than the call took, nor much of it unaccounted for,
                assert sum(seconds.values()) <= total
            shares = [sum(seconds.values()) / total for seconds, total in calls]
            if num_tokens == 200:  # but where this host had other work between two
                assert max(shares) > 0.8, (arm, shares)


REFUSALS = (
    (["layer", "--shape", "x"], "must be one of qwen3-30b-a3b"),
    (["layer", *TINY, "--arms", "tp,ep"], "--arms are single, tp,"),
    (["layer", *TINY, "--arms", "ep-tensor"], "differs from ep-replicated in the"),
    (["layer", "--shape", "8,128,96,2", "--group-size", "32", "--arms", "tp"],
     "F=96 over 2 ranks, 48 each, which must be a multiple"),
    (["layer", *TINY, "--tokens", "0"], "--tokens must be whole numbers"),
    (["layer", *TINY, "--runner", "fast"], "--runner is of auto, gather"),
    (["layer", *TINY, "--bits", "7"], "got 7 and 32"),
    (["layer", *TINY, "--memory-limit-gb", "1e-6"], "do not fit together (rank 0: it"),
    (["layer", "--shape", "4096,65536,65536,8", "--tokens", "1"], "this host need"),
    (["layer", *TINY, "--ranks", "3"], "got 3"),
    (["e2e", "--batch", "1,a"], "--batch must be whole numbers"),
    (["e2e", "--max-tokens", "1"], "--max-tokens must be 2 or more"),
    (["e2e", "--runner", "gather,blas"], "takes one --runner"),
    (["e2e", "--memory-limit-gb", "1e-6"], "do not fit"),
    (["fast"], "invalid choice"),
)  # fmt: skip


def test_wrong_usage_before_anything_is_built():
    """Exit code 2 on both ranks, one line of rank 0 that says why."""
    command = "mlx_ep.benchmark"
    found = outcomes_of(2, [c for c, _ in REFUSALS], command, f"{command}.__main__")
    for (options, text), ranks in zip(REFUSALS, found, strict=True):
        assert [code for code, _ in ranks] == [2, 2], (options, ranks)
        printed = ranks[0][1]
        assert text in printed and len(printed.splitlines()) == 1, printed


def test_layer_command(tmp_path: Path):
    file = tmp_path / "layer.json"
    options = [*TINY, "--tokens", "1,4", "--budget", "0", "--json", str(file), "--pin"]
    ranks = run_commands(2, [*COMMAND, "layer", *options])
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    content = json.loads(file.read_text())
    assert content["ranks"] == 2 and content["transport"] == "ring"
    assert "mlx_ep.benchmark layer --shape 8,128,64,2" in content["command"]
    assert content["pinning"].startswith("pinned") and content["fence"] == "default"
    assert len(content["rank_machines"]) == 2 and content["versions"]["mlx"]
    assert [r["arm"] for r in content["records"]] == [*LAYER_ARMS, *LAYER_ARMS]
    printed = ranks[0].stdout
    assert content["command"] in printed and "| tp " in printed
    assert "left out: ep-tensor" in printed
    assert not ranks[1].stdout


@pytest.mark.slow
def test_e2e_command(tmp_path: Path):
    """A whole model: arms whose logits agree, and what they move."""
    file = tmp_path / "e2e.json"
    options = ["--batch", "1,3", "--prompt-tokens", "9", "--max-tokens", "3"]
    options += ["--budget", "0", "--samples", "1", "--json", str(file)]
    ranks = run_commands(2, [*COMMAND, "e2e", *options])
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    records = json.loads(file.read_text())["records"]
    arms = ["single", "tp", "ep-replicated", "ep-tensor", "ep-gathered"]
    assert [r["arm"] for r in records[:5]] == arms
    points = [(r["phase"], r["batch"]) for r in records[::6]]
    assert points == [(p, b) for b in (1, 3) for p in ("prefill", "decode")]
    for record in records:
        assert set(record) >= FIELDS and record["level"] == "e2e"
        prefill = record["phase"] == "prefill"
        assert record["tokens"] == record["batch"] * (9 if prefill else 1)
        rate = record["tokens"] / record["seconds_median"]
        assert record["tokens_per_second"] == pytest.approx(rate)
        # mlx-lm's tp and tensor attention sum twice per layer, the experts once.
        expected = {"single": 0, "ep-replicated": 1}.get(record["arm"], 2)
        assert record["collectives"] == expected
        assert bool(sum(record["stages"].values())) == record["arm"].startswith("ep")
    assert not ranks[1].stdout


@pytest.mark.slow
def test_one_rank_runs_single_only():
    (rank,) = run_commands(
        1, [*COMMAND, "layer", *TINY, "--tokens", "2", "--budget", "0"]
    )
    assert rank.returncode == 0, rank.stderr
    assert "| 2 | single |" in rank.stdout and "| tp" not in rank.stdout
    assert "one rank runs arm single" in rank.stdout


@pytest.mark.slow
def test_generate_prints_timings():
    options = ["--max-tokens", "3", "--timings", "--prompt", "What is a hacker?"]
    ranks = run_commands(2, [sys.executable, "-m", "mlx_ep.generate", *options])
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    lines = ranks[0].stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "us per layer" in line)
    assert "rank 0 | rank 1" in lines[start]
    names = [line.split("|")[1].strip() for line in lines[start + 2 : start + 9]]
    expected = ["route", "assign", "dispatch", "experts", "combine", "wait", "all"]
    assert names == expected
