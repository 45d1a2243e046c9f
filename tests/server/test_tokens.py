"""Whoever runs beside it, on whatever ranks: a request's tokens are those of mlx-lm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlx_ep.loading import find_model
from mlx_ep.server.requests import Request
from tests.support.ranks import run_ranks
from tests.support.serving import (
    DATA,
    LOCAL,
    SHARED,
    TENSOR,
    Outcome,
    Script,
    alone,
    mixed_requests,
    serve,
)
from tests.support.tiny import QWEN3_MOE, save_checkpoint

pytestmark = pytest.mark.requires("ranks")

CANCELLED = {"r3": 0, "r6": 1, "r11": 3}


def _check(
    outcome: Outcome, expected: dict[str, list[int]], cancelled: dict[str, int]
) -> None:
    for request, tokens in expected.items():
        found, events = outcome.tokens(request), outcome.events[request]
        assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
        if request in cancelled and events[-1].finish_reason == "cancelled":
            assert found == tokens[: len(found)], request
            # The token that was on its way, and no more.
            assert len(found) <= cancelled[request] + 1
        else:
            assert found == tokens, request
            assert events[-1].finish_reason in ("stop", "length")
    assert outcome.running == 0
    assert outcome.kv_bytes == 0


@cache
def _asked(
    folder: str, count: int, longest: int, max_tokens: int
) -> tuple[list[Request], dict[str, list[int]]]:
    """Requests, and the tokens of each."""
    requests = mixed_requests(count, longest, max_tokens)
    return requests, alone(folder, requests)


def _play(
    num_ranks: int,
    sizes: tuple[int, int, int],
    config: dict[str, Any],
    kept: int,
    transport: str = "ring",
    look_ahead: bool = True,
    folder: str = "",
) -> None:
    folder = folder or str(find_model("jargon-moe"))
    requests, expected = _asked(folder, *sizes)
    scripts = [Script(requests, 16, CANCELLED), Script(requests, 16, CANCELLED, seed=1)]
    options = {
        "max_num_seqs": 16, "prefix_cache_memory": kept, "look_ahead": look_ahead,
    }  # fmt: skip
    ranks = run_ranks(
        num_ranks, serve, folder, config, options, scripts, transport=transport,
        timeout=300,
    )  # fmt: skip
    for outcome in ranks[0]:
        _check(outcome, expected, CANCELLED)
    # The same prompts again: all but their last tokens are there.
    assert (ranks[0][1].state.cache_hits > 0) == (kept > 0)
    is_own = "strategy" in config
    assert ranks[0][1].state.cache_bytes <= kept * (num_ranks if is_own else 1)
    for (others,) in ranks[1:]:
        assert (others.running, others.kv_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("num_ranks", "config", "kept", "look_ahead"),
    [
        (1, {}, 10**7, True),
        (2, {}, 10**7, True),
        (2, {}, 0, False),
        (2, TENSOR, 0, True),
        (2, DATA, 10**7, True),
        (2, DATA, 0, False),
        (2, LOCAL, 10**7, True),
        (3, LOCAL, 0, False),
        (2, SHARED, 10**7, True),
    ],
)
def test_tokens_are_those_of_mlx_lm_alone(
    num_ranks: int, config: dict[str, Any], kept: int, look_ahead: bool
) -> None:
    _play(num_ranks, (14, 70, 8), config, kept, look_ahead=look_ahead)


@pytest.mark.slow
@pytest.mark.requires("mpi")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_ranks", "config"),
    # The embedded model has 2 KV heads, which more ranks do not divide.
    [
        (n, c)
        for n in (1, 2, 3, 4)
        for c in ({}, TENSOR, DATA, LOCAL, SHARED)
        if (c != TENSOR or n < 3) and (c != SHARED or n > 1)
    ],
)
@pytest.mark.parametrize(("kept", "look_ahead"), [(0, False), (10**7, True)])
def test_64_requests_at_16(
    num_ranks: int, config: dict[str, Any], kept: int, look_ahead: bool
) -> None:
    _play(num_ranks, (64, 120, 24), config, kept, "mpi", look_ahead)


@pytest.mark.slow
@pytest.mark.requires("mpi")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_ranks", [3, 4])
@pytest.mark.parametrize(("kept", "look_ahead"), [(0, False), (10**7, True)])
def test_heads_that_3_and_4_ranks_divide(
    num_ranks: int, kept: int, look_ahead: bool, tmp_path: Path
) -> None:
    """`--attention tensor`, with random weights: the embedded model has 2 KV heads."""
    heads = {
        "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12,
        "head_dim": 16, "vocab_size": 1024,
    }  # fmt: skip
    folder = save_checkpoint(tmp_path / "model", QWEN3_MOE | heads)
    _play(num_ranks, (64, 120, 24), TENSOR, kept, "mpi", look_ahead, str(folder))


@pytest.mark.slow
@pytest.mark.requires("mpi")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", [{}, DATA], ids=["replicated", "data"])
@pytest.mark.parametrize("transport", ["mpi", "ring"])
def test_batches_in_two_halves(config: dict[str, Any], transport: str) -> None:
    """`--overlap two`: one half of a batch computes while the other half travels."""
    _play(2, (32, 120, 24), config | {"overlap": "two"}, 10**7, transport)
