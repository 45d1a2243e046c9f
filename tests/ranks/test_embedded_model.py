"""The embedded model on real ranks gives mlx-lm's tokens."""

from __future__ import annotations

import pytest

from benchmarks.bench_tokens import LOGIT_TOLERANCE, RUNS, compare


@pytest.mark.requires("ranks")
def test_greedy_tokens_of_two_ranks() -> None:
    (record,) = compare(2, 16, [(2, "ring")])
    assert record["differing_answers"] == 0
    assert record["largest_logit_difference"] < LOGIT_TOLERANCE
    assert record["tokens"] == 2 * 16


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.requires("ranks", "mpi")
def test_greedy_tokens_of_every_number_of_ranks() -> None:
    for record in compare(20, 64, RUNS):
        assert record["differing_answers"] == 0, record
        assert record["tokens"] == 20 * 64
        assert record["largest_logit_difference"] < LOGIT_TOLERANCE
