"""`mlx_ep.simulate --overlap`: what is hidden of the exchanges of a profile's steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_ep.cost.overlap import StepParts, hidden_by_halves, hidden_by_shared
from mlx_ep.cost.profile import find_profile
from mlx_ep.cost.shape import MatrixTotal
from mlx_ep.cost.step import step_cost
from mlx_ep.loading import model_shape
from mlx_ep.models.two_batch import LEAST_PROMPT as LEAST_OF_MODELS
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.times.profile_times import LEAST_PROMPT, ProfileTimes
from tests.support.simulate.data import (
    MOE,
    cluster,
    instance,
    make_folder,
    trace_lines,
    write_trace,
)
from tests.support.simulate.running import make_engine, run_command

PROFILE = find_profile("m3-ultra")
PLAIN = model_shape(MOE, dtype="bfloat16", name="tiny")
SHARED = replace(
    PLAIN, layer=replace(PLAIN.layer, shared=MatrixTotal(10**7, 2 * 10**7))
)
BATCHES = {
    "one token": StepBatch(decodes=[9]),
    "single tokens": StepBatch(decodes=[2000] * 64),
    "short prompt": StepBatch(prefills=[(15, 0)]),
    "prompts and tokens": StepBatch(prefills=[(700, 0), (300, 9)], decodes=[5] * 8),
}
MEMBERS = {
    "replicated": [instance(hardware="m3-ultra", num_npus=2, tp_size=2, ep_size=2)],
    "gathered": [
        instance(hardware="m3-ultra", ep_size=2, dp_group="a") for _ in range(2)
    ],
}


def _times(folder: Path, exchange: str, overlap: Any, shape: Any) -> ProfileTimes:
    make_folder(folder, c=cluster(*MEMBERS[exchange]))
    trace = write_trace(folder / "t.jsonl", trace_lines(1))
    group = make_engine(folder / "c.json", trace).groups[0].instances
    return ProfileTimes(group, PROFILE, shape, exchange, overlap=overlap)


def _ns(times: ProfileTimes, batch: StepBatch, members: int) -> np.ndarray:
    return times.stage_ns([batch] * members, 3, 0)[0]


@pytest.mark.parametrize("exchange", MEMBERS)
@pytest.mark.parametrize("name", BATCHES)
def test_auto_takes_the_least(exchange: str, name: str, tmp_path: Path) -> None:
    """Never above a way that agrees as often; and `single` hides something."""
    ns = {}
    for overlap in ("none", "single", "two", "auto"):
        times = _times(tmp_path, exchange, overlap, SHARED)
        ns[overlap] = _ns(times, BATCHES[name], len(MEMBERS[exchange]))
    assert (ns["auto"] <= ns["two"]).all()
    if exchange == "replicated":  # else the others have one agreement less
        assert (ns["auto"] <= ns["none"]).all() and (ns["auto"] <= ns["single"]).all()
    assert (ns["single"] < ns["none"]).all()  # the shared experts hide something
    if exchange == "replicated":
        is_cut = name in ("single tokens", "prompts and tokens")
        assert is_cut == (ns["two"] != ns["single"]).any()


def test_without_shared_experts_nothing_is_beside(tmp_path: Path) -> None:
    batch = BATCHES["single tokens"]
    none, single = (
        _ns(_times(tmp_path, "replicated", way, PLAIN), batch, 1)
        for way in ("none", "single")
    )
    assert (none == single).all()


def test_split_shared_experts_are_not_beside(tmp_path: Path) -> None:
    """Split attention splits shared experts too, and one sum is of both."""
    make_folder(tmp_path, c=cluster(*MEMBERS["replicated"]))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    group = make_engine(tmp_path / "c.json", trace).groups[0].instances
    none, single = (
        ProfileTimes(group, PROFILE, SHARED, overlap=way) for way in ("none", "single")
    )
    assert single.arm == "ep-tensor"
    batch = BATCHES["single tokens"]
    assert (_ns(none, batch, 1) == _ns(single, batch, 1)).all()


@pytest.mark.parametrize("arm", ["ep-replicated", "ep-gathered", "ep-all-to-all"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 400, 5000])
def test_hidden_is_never_more_than_the_exchange(arm: str, tokens: int) -> None:
    cost = step_cost(
        PROFILE, SHARED, arm, tokens=4 * tokens, phase="decode", num_ranks=4
    )
    step = StepParts.of(cost, SHARED.num_layers)
    crossing = cost.moe.collectives * PROFILE.link(None).crossing_seconds
    assert crossing > 0
    exchange = cost.num_moe_layers * (cost.moe.communication - crossing)
    assert step.layers * (step.dispatch + step.combine) == pytest.approx(exchange)
    assert (step.dispatch > 0) == (arm != "ep-replicated")
    assert 0 < hidden_by_shared(step) <= exchange
    long = np.array([0.0, 1.0])  # scores of so long a context hide all that there is
    hidden = hidden_by_halves(step, step, (long, long))
    assert (hidden > 0).all() and (hidden <= 2 * exchange).all()
    assert hidden[0] <= hidden[1]


@pytest.mark.parametrize("exchange", MEMBERS)
def test_crossings_are_never_hidden(exchange: str, tmp_path: Path) -> None:
    """A link of no time but its crossing leaves nothing to hide."""
    link = PROFILE.link(None)
    only = replace(link, latency=0.0, bandwidth=1e30, tables={}, crossing_seconds=1e-3)
    profile = replace(PROFILE, links={"only": only})
    make_folder(tmp_path, c=cluster(*MEMBERS[exchange]))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    group = make_engine(tmp_path / "c.json", trace).groups[0].instances
    batch = BATCHES["single tokens"]
    none, single, two = (
        _ns(
            ProfileTimes(group, profile, SHARED, exchange, overlap=way),
            batch,
            len(group),
        )
        for way in ("none", "single", "two")
    )
    assert (single == none).all()
    assert (two > none).all()  # two halves cross twice as often


@pytest.mark.parametrize("exchange", MEMBERS)
def test_one_more_agreement_with_two(exchange: str, tmp_path: Path) -> None:
    """What cannot be cut runs as `single`, behind an agreement of ranks whose tokens
    are their own; ranks with the same tokens have nothing to agree on.
    """
    members = len(MEMBERS[exchange])
    ns = {
        way: _ns(_times(tmp_path, exchange, way, SHARED), BATCHES["one token"], members)
        for way in ("single", "two", "auto")
    }
    arm = f"ep-{exchange}"
    cost = step_cost(PROFILE, SHARED, arm, tokens=2, phase="decode", num_ranks=2)
    least = PROFILE.sync_seconds + PROFILE.link(None).crossing_seconds
    if exchange == "gathered":
        assert least < cost.agreement < cost.seconds
    else:
        assert cost.agreement == 0
    expected = ns["single"] + cost.agreement * 1e9
    np.testing.assert_allclose(ns["two"], expected, atol=2)
    np.testing.assert_allclose(ns["auto"], expected, atol=2)


def test_halves_by_hand() -> None:
    """Three layers; the last exchange of the second half has nothing behind it."""
    first = StepParts(1.0, 3, before=2.0, experts=3.0, shared=0, dispatch=0, combine=4)
    second = replace(first, before=1.0, experts=1.0, combine=9.0)
    assert hidden_by_halves(first, second) == 3 * min(4, 2) + 2 * min(9, 5)
    first, second = replace(first, dispatch=7.0), replace(second, dispatch=0.5)
    # dispatch behind attention, dispatch behind experts, combine behind experts.
    every = min(7, 1) + min(0.5, 3) + min(4, 1)
    assert hidden_by_halves(first, second) == 3 * every + 2 * min(9, 2)


def test_prompts_are_cut_as_the_package_cuts_them() -> None:
    assert LEAST_PROMPT == LEAST_OF_MODELS


def test_command(tmp_path: Path) -> None:
    """The same bytes twice, and by `auto` never later than without."""
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(12))
    make_folder(tmp_path, c=cluster(*MEMBERS["replicated"]))
    found = {}
    for name, way in (("none", "none"), ("two", "two"), ("a", "auto"), ("b", "auto")):
        file = tmp_path / f"{name}.csv"
        outcome = run_command(
            ["--cluster-config", tmp_path / "c.json", "--dataset", trace, "--output",
             file, "--expert-exchange", "replicated", "--overlap", way]
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        found[name] = file.read_bytes()
    assert found["a"] == found["b"]
    ends = {
        name: max(int(line.split(b",")[6]) for line in content.splitlines()[1:])
        for name, content in found.items()
    }
    assert ends["a"] <= min(ends["none"], ends["two"])
    assert ends["two"] != ends["none"]


@pytest.mark.parametrize(
    ("members", "flags", "text"),
    [
        ([instance(hardware="m3-ultra")], ["--overlap", "two"], "arm single"),
        (
            [instance(hardware="m3-ultra", num_npus=2, tp_size=2, ep_size=1)],
            ["--overlap", "auto"],
            "arm tp",
        ),
        ([instance()], ["--overlap", "single"], "the kernels of the bundle"),
        ([instance()], ["--overlap", "three"], "--overlap"),
    ],
)
def test_refused(
    members: list[dict[str, Any]], flags: list[str], text: str, tmp_path: Path
) -> None:
    make_folder(tmp_path, c=cluster(*members))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    outcome = run_command(
        ["--cluster-config", tmp_path / "c.json", "--dataset", trace, *flags]
    )
    assert outcome.code == 2
    error = outcome.err.strip().splitlines()[-1]
    assert text in error and "Traceback" not in outcome.err
