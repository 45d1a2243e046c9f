"""What benchmarks share: ranks on cores of their own, without shape checks."""

from __future__ import annotations

import sys
from types import ModuleType

import mlx.core as mx
import pytest

from benchmarks.harness import environment, interleaved, run_pinned


def on_rank(group: mx.distributed.Group, number: int) -> list[int]:
    from mlx_ep.metrics import aligned

    # Where shapes are checked, each function is wrapped.
    return [number, group.size(), int(hasattr(aligned, "__wrapped__"))]


@pytest.mark.requires("ranks")
def test_a_benchmark_s_ranks_check_no_shapes() -> None:
    assert run_pinned(1, on_rank, 7) == [[7, 1, 0]]


def test_arms_are_timed_in_turn_and_warm_ups_are_not_counted() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in "AB"}
    found = interleaved(arms, 3, warmup=2, barrier=lambda: order.append("-"))
    assert order == ["-", "A", "-", "B"] * 5
    assert {name: len(samples.seconds) for name, samples in found.items()} == {
        "A": 3,
        "B": 3,
    }


def test_a_benchmark_named_as_a_file_is_the_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench_load.py", "--quick"])
    assert environment()["command"] == "python -m benchmarks.bench_load --quick"
