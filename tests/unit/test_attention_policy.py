"""The choice between replicated and tensor attention, by numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_ep.config import EPConfig
from mlx_ep.cost.attention import (
    ASSUMED,
    AttentionChoice,
    Speeds,
    choose_attention,
    cluster_speeds,
)
from mlx_ep.cost.profile import find_profile
from mlx_ep.cost.profile_store import store_profile
from mlx_ep.loading.dense import DensePart, decide, known_speeds
from mlx_ep.loading.memory import MemoryNeed
from mlx_ep.plan.speeds import calibrated_profile
from mlx_ep.types import LMHead

# 8 GB at 100 GB/s take 80 ms; over 2 ranks 40 ms, and 50 collectives of 0.1 ms 5 ms.
SPEEDS = Speeds(100e9, 100e-6, "made up")


def _choose(wish: str = "auto", **changed: Any) -> AttentionChoice:
    arguments: dict[str, Any] = {
        "num_ranks": 2,
        "problem": "",
        "split_bytes": 8 * 10**9,
        "collectives": 50,
        "fits_replicated": True,
        "fits_tensor": True,
        "speeds": SPEEDS,
    }
    return choose_attention(wish, **{**arguments, **changed})


@pytest.mark.parametrize(
    ("wish", "metal", "taken"),
    [
        ("auto", (False, False), "auto"),
        ("auto", (False, True), "whole"),
        ("split", (True, True), "split"),
        ("whole", (False, False), "whole"),
    ],
)
def test_the_lm_head_stays_whole_where_a_rank_has_metal(
    wish: LMHead, metal: tuple[bool, bool], taken: str
) -> None:
    config = EPConfig(attention="tensor", lm_head=wish)
    parts = [DensePart("", 100, 50, 8, has_metal=each) for each in metal]
    needs = [MemoryNeed("host", 1000, 10**9)] * 2
    choice, split = decide(config, parts, needs)
    assert (choice.attention, choice.lm_head) == ("tensor", taken)
    assert [need.num_bytes for need in split] == [950, 950]
    assert decide(EPConfig(), parts, needs)[0].lm_head == "whole"


def test_the_faster_one_is_taken_with_both_times() -> None:
    choice = _choose()
    assert choice.attention == "tensor"
    assert choice.replicated_seconds == pytest.approx(0.080)
    assert choice.tensor_seconds == pytest.approx(0.045)
    for text in ("80.00 ms", "45.00 ms", "8 GB", "100 GB/s", "100 us", "made up"):
        assert text in str(choice)


@pytest.mark.parametrize(
    ("latency", "expected"),
    # 40 ms are saved: 50 collectives may take 0.8 ms each.
    [(0.79e-3, "tensor"), (0.81e-3, "replicated")],
)
def test_the_latency_decides(latency: float, expected: str) -> None:
    assert _choose(speeds=Speeds(100e9, latency, "")).attention == expected


def test_all_wait_for_the_slowest_rank() -> None:
    ranks = [Speeds(100e9, 2e-6, "a"), Speeds(50e9, 1e-6, "b")]
    assert cluster_speeds(ranks) == Speeds(50e9, 2e-6, "a; b")
    measured = Speeds(70e9, 3e-6, "measured", is_measured=True)
    assert cluster_speeds([measured, *ranks]) == measured
    # Another rank's measurement may be of another cluster.
    assert cluster_speeds([*ranks, measured]).bandwidth == 50e9


def _write(folder: Path, name: str, chips: list[str], **numbers: Any) -> None:
    profile = replace(find_profile("m3-ultra"), name=name, kind="measured", **numbers)
    store_profile(profile, folder / "mlx_ep", "ring", chips)


def test_speeds_of_a_calibrated_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _write(tmp_path, "2 x Chip, ring", ["Chip"] * 2, memory_bandwidth=5e9)
    speeds = known_speeds(["Chip"] * 2, 0, "ring")
    assert speeds.bandwidth == 5e9
    # m3-ultra's ring of 2: two messages of 288 us and a crossing of 180 us, 16 KB.
    assert speeds.latency == pytest.approx(2 * 288e-6 + 180e-6, rel=0.02)
    assert speeds.is_measured
    assert "2 x Chip, ring" in speeds.source and "implausible" not in speeds.source
    _write(tmp_path, "odd", ["Odd"] * 2, memory_bandwidth=5.0)
    odd = known_speeds(["Odd"] * 2, 0, "ring")
    assert "implausible: memory_bandwidth = 5: must be from" in odd.source
    # Other chips, ranks or cables are another cluster.
    assert known_speeds(["Other"] * 2, 0, "ring") == ASSUMED
    assert known_speeds(["Chip"] * 3, 0, "ring") == ASSUMED
    assert known_speeds(["Chip"] * 2, 0, "jaccl") == ASSUMED


def test_a_cluster_of_two_chips_finds_its_calibration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same one for every rank, in any order of ranks, and for mlx_ep.plan."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chips = ["Apple M3 Ultra", "Apple M4 Max"]
    _write(tmp_path, "slowest of two", chips, memory_bandwidth=7e9)
    for rank in range(2):
        for order in (chips, chips[::-1]):
            speeds = known_speeds(order, rank, "ring")
            assert (speeds.bandwidth, speeds.is_measured) == (7e9, True)
    found = calibrated_profile(2)
    assert found is not None
    assert found.memory_bandwidth == 7e9
    assert calibrated_profile(3) is None
    assert not known_speeds(chips[:1] * 2, 0, "ring").is_measured


def test_speeds_of_a_known_chip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speeds = known_speeds(["Apple M3 Ultra"] * 2, 1, "jaccl")
    assert speeds.bandwidth == find_profile("m3-ultra").memory_bandwidth
    assert not speeds.is_measured
    assert "M3 Ultra" in speeds.source
    # No such cable in the profile: its latency is assumed, and that is said.
    speeds = known_speeds(["Apple M3 Ultra"] * 2, 1, "mpi")
    assert speeds.latency == ASSUMED.latency
    assert "assumed" in speeds.source


def test_equal_times_are_replicated() -> None:
    assert _choose(split_bytes=0, collectives=0).attention == "replicated"


def test_more_ranks_save_more() -> None:
    assert _choose(num_ranks=4).tensor_seconds == pytest.approx(0.025)


def test_what_fits_goes_first() -> None:
    slow = Speeds(100e9, 1.0, "slow")
    choice = _choose(speeds=slow, fits_replicated=False)
    assert choice.attention == "tensor"
    assert "replicated does not fit" in choice.reason
    # Neither fits: the faster one, and the check of the memory refuses it.
    neither = _choose(speeds=slow, fits_replicated=False, fits_tensor=False)
    assert neither.attention == "replicated"


def test_one_rank_has_nothing_to_split() -> None:
    assert _choose(num_ranks=1, speeds=Speeds(1.0, 0.0, "")).attention == "replicated"


def test_a_problem() -> None:
    choice = _choose(problem="it has 3 heads")
    assert (choice.attention, choice.reason) == ("replicated", "it has 3 heads")
    assert choice.replicated_seconds is None
    with pytest.raises(ValueError, match="it has 3 heads"):
        _choose("tensor", problem="it has 3 heads")
    assert _choose("replicated", problem="it has 3 heads").reason == "as asked for"


def test_a_wish_is_followed() -> None:
    assert _choose("tensor", speeds=Speeds(100e9, 9.0, "")).attention == "tensor"
    assert _choose("replicated").attention == "replicated"


def test_what_is_assumed_says_so() -> None:
    assert "assumed" in _choose(speeds=ASSUMED).reason
