"""The server's scheduler in simulated time: the steps of the server itself."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.loading import find_model
from mlx_ep.server.engine import ServingEngine
from mlx_ep.server.requests import Request, Sampling
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.memory import KvPool
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.traces import read_trace
from tests.support.serving import load_engine
from tests.support.simulate.data import (
    cluster,
    instance,
    make_folder,
    trace_lines,
    two_members,
    write_trace,
)
from tests.support.simulate.running import make_engine, run_command

STEP = 1000  # ns
SAID = 40
ENDLESS = Sampling(logit_bias={SAID: 100.0})
# Of the embedded model: 4 layers, keys and values of 2 heads of 32 float32 numbers.
TOKEN_BYTES = 4 * 2 * 2 * 32 * 4
PLACES, PREFILL_STEP = 4, 32


@dataclass(frozen=True)
class Step:
    """Prompts: (tokens with padding, tokens before). Sequences in the pass, and those
    that get a token by it.
    """

    prompts: tuple[tuple[int, int], ...]
    rows: int
    made: tuple[str, ...]


@dataclass
class Recorded:
    """What a server did: its steps, and how many each request came after."""

    steps: list[Step] = field(default_factory=list)
    came: dict[str, int] = field(default_factory=dict)


def _requests(count: int) -> list[Request]:
    """Of many lengths; some begin as others do, and some begin as others' answers."""
    rng = random.Random(5)
    made: list[Request] = []
    for index in range(count):
        length = rng.choice([1, 2, 5, 30, 70, 110, 140])
        tokens = [rng.randrange(50, 1000) for _ in range(length)]
        if made and index % 3 == 0:
            tokens = [*rng.choice(made).tokens, SAID, *tokens[:20]]
        made.append(Request(f"{index}", tuple(tokens), rng.choice([1, 2, 9, 25])))
    return [replace(request, sampling=ENDLESS) for request in made]


def _serve(engine: ServingEngine, requests: Sequence[Request]) -> Recorded:
    """Turns of a server's loop, with requests that come between them."""
    rng, found, waiting = random.Random(7), Recorded(), list(requests)
    worker, step = engine._worker, engine._worker.step

    def recorded(decision: Any, begun: Any) -> None:
        before = {place: worker.running[place].done for place in worker.running}
        for enter in decision.enter:
            before[enter.place] = enter.hit.num_tokens if enter.hit else 0
        step(decision, begun)
        chunks = decision.prefill.get(0, [])
        longest = max((count for _, count in chunks), default=0)
        made = tuple(sorted(row.request.id for row in worker._rows))
        prompts = tuple((longest, before[place]) for place, _ in chunks)
        if chunks or worker._pass.rows:
            found.steps.append(Step(prompts, len(worker._pass.rows), made))

    worker.step = recorded  # type: ignore[method-assign]
    while waiting or engine._scheduler.has_work:
        if not engine._scheduler.has_work or rng.random() < 0.2:
            for request in waiting[: rng.choice([0, 1, 1, 4])]:
                found.came[request.id] = len(found.steps)
                engine.submit(request, lambda event: None)
            waiting = waiting[len(found.came) - len(requests) + len(waiting) :]
        if engine._scheduler.has_work:
            engine._turn()
    return found


class UnitTimes:
    """Every step takes as long; keeps what was in them."""

    def __init__(self) -> None:
        self.batches: list[StepBatch] = []

    def stage_ns(
        self, batches: Sequence[StepBatch], steps: int, first_step: int
    ) -> np.ndarray:
        if steps == 1:
            self.batches.append(batches[0])
        return np.full((1, steps), STEP)


def _simulate(
    folder: Path, requests: Sequence[Request], came: dict[str, int], *flags: str
) -> tuple[list[Step], Simulation]:
    """The same requests at the same places between steps of one length."""
    lines = [
        {
            "input_toks": len(request.tokens),
            "output_toks": request.max_tokens,
            "arrival_time_ns": max(0, came[request.id] * STEP - 1),
            "input_tok_ids": list(request.tokens),
            "output_tok_ids": [SAID] * request.max_tokens,
        }
        for request in requests
    ]
    make_folder(folder, c=cluster(instance(hardware="m3-ultra")))
    trace = folder / "t.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--scheduler", "mlx_ep", "--max-num-seqs", str(PLACES), *flags)
    made = make_engine(
        folder / "c.json", trace, "--prefill-step", str(PREFILL_STEP), *flags
    )
    pool = KvPool(100, 16, 16 * TOKEN_BYTES, POOL, 0, 0.9)
    instances = [replace(made.cluster.instances[0], pool=pool)]
    opened = replace(made.cluster, instances=instances, groups=[tuple(instances)])
    times = UnitTimes()
    engine = Simulation(opened, read_trace(trace), [times])
    # One step after another, to see them all.
    engine.groups[0]._steps_alike = lambda: 1  # type: ignore[method-assign]
    engine.run()
    steps = [
        Step(
            tuple(batch.prefills),
            len(batch.decodes),
            tuple(sorted(str(request.index) for request in batch.making)),
        )
        for batch in times.batches
    ]
    return steps, engine


# Sequences up to 256 tokens fit three times, and as much as one keeps prefixes.
POOL = 4 * 256 * TOKEN_BYTES


@pytest.mark.parametrize("look_ahead", [True, False])
def test_steps_are_those_of_the_server(tmp_path: Path, look_ahead: bool) -> None:
    options = {
        "max_kv_memory": POOL * 3 // 4,
        "prefix_cache_memory": POOL // 4,
        "prefill_step": PREFILL_STEP,
        "max_num_seqs": PLACES,
        "look_ahead": look_ahead,
    }
    group = mx.distributed.init()
    engine = load_engine(group, str(find_model("jargon-moe")), {}, options)
    requests = _requests(24)
    served = _serve(engine, requests)
    flag = "--async-scheduling" if look_ahead else "--no-async-scheduling"
    ours, simulation = _simulate(tmp_path, requests, served.came, flag)
    assert ours == served.steps
    # What is compared has what there is to go wrong.
    assert any(len(step.prompts) > 1 for step in ours)
    assert max(step.rows for step in ours) == 3 < PLACES  # memory is short, not places
    hits = [r for r in simulation.requests if r.asked.input_tokens > 64]
    assert any(before for step in ours for _, before in step.prompts) and hits
    assert engine.state().cache_hits > 0
    assert any(step.rows > len(step.made) for step in ours) == look_ahead


def test_many_steps_at_once_are_the_same(tmp_path: Path) -> None:
    """Long answers in few rounds of the loop, and byte for byte as one by one."""
    make_folder(tmp_path, c=cluster(instance(hardware="m3-ultra")))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(40, outputs=(1, 300)))
    rows: list[list[tuple[int, ...]]] = []
    for is_slow in (False, True):
        engine = make_engine(
            tmp_path / "c.json", trace, "--scheduler", "mlx_ep", "--max-num-seqs", "8"
        )
        rounds, iterate = [0], engine.groups[0].iterate

        def counted(until: int, rounds: Any = rounds, iterate: Any = iterate) -> Any:
            rounds[0] += 1
            return iterate(until)

        engine.groups[0].iterate = counted  # type: ignore[method-assign]
        if is_slow:
            engine.groups[0]._steps_alike = lambda: 1  # type: ignore[method-assign]
        engine.run()
        rows.append([(r.index, r.scheduled, r.first, r.end) for r in engine.requests])
        rows[-1].append((rounds[0],))
    assert rows[0][:-1] == rows[1][:-1]
    assert 4 * rows[0][-1][0] < rows[1][-1][0]


def test_members_have_one_queue(tmp_path: Path) -> None:
    """Attention of their own: each request on the member with less to do."""
    make_folder(tmp_path, two=two_members(hardware="m3-ultra"))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(12))
    flags = ("--scheduler", "mlx_ep", "--max-num-seqs", "6")
    engine = make_engine(tmp_path / "two.json", trace, *flags)
    engine.run()
    assert {request.instance for request in engine.requests} == {0, 1}
    assert all(request.end >= request.first > 0 for request in engine.requests)
    running = [stretch.running for stretch in engine.groups[0].log.stretches]
    assert max(running) == 6  # of all ranks together


def test_a_bundles_passes_are_added(tmp_path: Path) -> None:
    make_folder(tmp_path, c=cluster(instance()))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    vllm = make_engine(tmp_path / "c.json", trace).groups[0]._times
    ours = make_engine(tmp_path / "c.json", trace, "--scheduler", "mlx_ep")
    times = ours.groups[0]._times
    both = StepBatch(prefills=[(32, 0)], decodes=[5, 5])
    parts = [StepBatch(prefills=both.prefills), StepBatch(decodes=both.decodes)]
    added = sum(vllm.stage_ns([part], 1, 0)[0, 0] for part in parts)
    assert times.stage_ns([both], 1, 0)[0, 0] == added
    assert added > vllm.stage_ns([both], 1, 0)[0, 0]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"pp_size": 2}, "pp_size"),
        ({"pd_type": "decode"}, "pd_type"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill"),
        ({"long_prefill_token_threshold": 64}, "long_prefill_token_threshold"),
        ({"skip_prefill": True}, "skip_prefill"),
        ({"prefill_step": 0}, "prefill_step"),
        ({"scheduler": "other"}, "scheduler"),
    ],
)
def test_what_the_server_has_not_is_refused(
    tmp_path: Path, changes: dict[str, Any], where: str
) -> None:
    one = instance(**({"scheduler": "mlx_ep"} | changes))
    make_folder(tmp_path, c=cluster(one))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    outcome = run_command(["--cluster-config", tmp_path / "c.json", "--dataset", trace])
    assert outcome.code == 2 and f"instances[0].{where}" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_request_that_never_fits_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, c=cluster(instance(hardware="m3-ultra")))
    line = {"input_toks": 10**6, "output_toks": 1, "arrival_time_ns": 0}
    trace = tmp_path / "t.jsonl"
    trace.write_text(json.dumps(line) + "\n")
    argv: list[str | Path] = ["--cluster-config", tmp_path / "c.json"]
    outcome = run_command([*argv, "--dataset", trace, "--scheduler", "mlx_ep"])
    assert outcome.code == 2 and "line 1 of the trace" in outcome.err
    assert "1000001 tokens must fit" in outcome.err


def test_a_token_budget_is_said_to_have_no_effect(tmp_path: Path) -> None:
    """The server has none: one line for each instance that is given one."""
    given = instance(hardware="m3-ultra", max_num_batched_tokens=512)
    make_folder(tmp_path, c=cluster(given))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    argv = ["--cluster-config", tmp_path / "c.json", "--dataset", trace]
    served = run_command([*argv, "--scheduler", "mlx_ep"])
    (line,) = (line for line in served.err.splitlines() if "no effect" in line)
    assert served.code == 0
    assert "nodes[0].instances[0]: max_num_batched_tokens 512 has no effect" in line
    assert "no effect" not in run_command(argv).err
