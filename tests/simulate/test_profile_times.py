"""A step by a profile: the forwards of mlx-lm's batches, and the loop around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_ep.cost.profile import (
    MEASURED_ONLY,
    find_profile,
    from_json,
    overridden,
    to_json,
)
from mlx_ep.cost.step import step_cost
from mlx_ep.loading import model_shape
from mlx_ep.simulate.requests import ServedRequest
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.times.profile_times import ProfileTimes
from tests.support.simulate.data import (
    MOE,
    cluster,
    instance,
    make_folder,
    trace_lines,
    write_trace,
)
from tests.support.simulate.running import make_engine, run_command

SHAPE = model_shape(MOE, dtype="bfloat16", name="tiny")
PROFILE = find_profile("m3-ultra")


def _times(folder: Path, profile: Any = PROFILE, exchange: str = "allgather") -> Any:
    make_folder(folder, c=cluster(instance(hardware="m3-ultra")))
    trace = write_trace(folder / "t.jsonl", trace_lines(1))
    engine = make_engine(folder / "c.json", trace)
    return ProfileTimes(engine.groups[0].instances, profile, SHAPE, exchange)


def _seconds(times: ProfileTimes, batch: StepBatch) -> float:
    return float(times.stage_ns([batch], 1, 0)[0, 0]) / 1e9


def _forward(tokens: int, logits: int | None = None) -> float:
    cost = step_cost(
        PROFILE, SHAPE, "single", tokens=tokens, phase="decode", logits=logits
    )
    return cost.seconds


def test_prompts_and_single_tokens_are_separate_forwards(tmp_path: Path) -> None:
    """64 tokens of a prompt that goes on, and four single tokens."""
    times = _times(tmp_path)
    prompt, single = StepBatch(prefills=[(64, 0)]), StepBatch(decodes=[1] * 4)
    both = StepBatch(prefills=[(64, 0)], decodes=[1] * 4)
    alone = _seconds(times, single)
    assert alone == pytest.approx(_forward(4), rel=0.01)
    assert _seconds(times, prompt) == pytest.approx(_forward(64, 0), rel=0.02)
    assert _seconds(times, both) == pytest.approx(
        _seconds(times, prompt) + alone, rel=1e-6
    )
    # What only fills caches leaves out the last layer's experts.
    assert _forward(64, 0) < _forward(64)


def test_a_prompt_that_ends_runs_its_last_token_by_itself(tmp_path: Path) -> None:
    times, request = _times(tmp_path), ServedRequest.__new__(ServedRequest)
    going = StepBatch(prefills=[(64, 0)])
    ending = replace(going, making=[request])
    more = _seconds(times, ending) - _seconds(times, going)
    assert more == pytest.approx(_forward(1), rel=0.05)


def test_the_loop_is_counted_per_step_and_sequence(tmp_path: Path) -> None:
    added = {
        "loop_seconds": 0.25,
        "sequence_seconds": 0.125,
        "loop_layer_seconds": 0.5,
        "logit_seconds": 0.001,
    }
    vocabulary = SHAPE.head.weights / SHAPE.layer.width
    each = 0.125 + 0.001 * vocabulary
    assert vocabulary >= 1
    looped = _times(tmp_path, overridden(PROFILE, added))
    plain, batch = _times(tmp_path), StepBatch(decodes=[1] * 4)
    more = _seconds(looped, batch) - _seconds(plain, batch)
    layers = SHAPE.num_layers
    assert more == pytest.approx(0.25 + 4 * each + layers * 0.5)
    # A prompt is a forward of its own.
    both = replace(batch, prefills=[(8, 0)])
    more = _seconds(looped, both) - _seconds(plain, both)
    assert more == pytest.approx(0.25 + 4 * each + 2 * layers * 0.5)


def test_scores_are_those_of_the_cost_model(tmp_path: Path) -> None:
    """Of single queries and of prompts, with numbers that only a measurement has."""
    measured = {
        "query_seconds": 1e-6,
        "unseen_seconds": 2e-6,
        "score_seconds": 1e-4,
        "prompt_score_seconds": 3e-4,
    }
    profile = overridden(PROFILE, measured)
    times = _times(tmp_path, profile)

    def cost(**options: Any) -> float:
        return step_cost(profile, SHAPE, "single", **options).seconds

    decode = _seconds(times, StepBatch(decodes=[31, 31]))
    assert decode == pytest.approx(cost(tokens=2, phase="decode", context=30), rel=1e-6)
    prompt = _seconds(times, StepBatch(prefills=[(16, 5)]))
    wanted = cost(tokens=16, phase="prefill", context=5, logits=0)
    assert prompt == pytest.approx(wanted, rel=1e-3)


def test_a_profile_without_the_loop_says_so(tmp_path: Path) -> None:
    content = to_json(PROFILE)
    for name in MEASURED_ONLY:
        del content[name]
    old = from_json(content)
    assert not any(getattr(old, name) for name in MEASURED_ONLY)
    make_folder(tmp_path, c=cluster(instance(hardware="m3-ultra")))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    outcome = run_command(["--cluster-config", tmp_path / "c.json", "--dataset", trace])
    assert outcome.code == 0
    assert "m3-ultra has no loop_seconds" in outcome.err
    assert "attention_rate is assumed, for others 0" in outcome.err


def test_one_machine_runs_this_package_or_mlx_lm(tmp_path: Path) -> None:
    assert _times(tmp_path).arm == "single"
    assert _times(tmp_path, exchange="replicated").arm == "ep-replicated"
