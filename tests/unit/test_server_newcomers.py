"""Requests that are being read enter with one that has come; for a moment only."""

from __future__ import annotations

import threading
import time

import pytest

from mlx_ep.server import newcomers
from mlx_ep.server.newcomers import Newcomers
from tests.support.waiting import LONG


def _wait(coming: Newcomers, wake: threading.Condition, may_wait: bool = True) -> float:
    start = time.monotonic()
    with wake:
        coming.wait(lambda: may_wait)
    return time.monotonic() - start


@pytest.mark.parametrize(
    ("has_come", "expected", "may_wait"),
    [(False, 1, True), (True, 0, True), (True, 1, False)],
)
def test_nobody_is_waited_for_in_vain(
    has_come: bool, expected: int, may_wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newcomers, "EXPECT_LIMIT", LONG)
    wake = threading.Condition()
    coming = Newcomers(wake)
    with wake:
        coming.expect(expected)
        if has_come:
            coming.note()
    assert _wait(coming, wake, may_wait) < LONG / 2


def test_one_that_has_come_waits_until_the_last_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(newcomers, "EXPECT_LIMIT", LONG)
    wake = threading.Condition()
    coming = Newcomers(wake)
    with wake:
        coming.expect(2)
        coming.note()
    told: list[str] = []

    def read() -> None:
        for name in ("second", "third"):
            time.sleep(0.02)
            with wake:
                told.append(name)
                coming.note()
                coming.expect(-1)

    thread = threading.Thread(target=read)
    thread.start()
    assert _wait(coming, wake) < LONG / 2
    assert told == ["second", "third"]
    thread.join()
    # The next step waits only where another one has come since.
    with wake:
        coming.expect(1)
    assert _wait(coming, wake) < LONG / 2


def test_the_wait_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newcomers, "EXPECT_LIMIT", 0.05)
    wake = threading.Condition()
    coming = Newcomers(wake)
    with wake:
        coming.expect(1)
        coming.note()
    assert 0.05 <= _wait(coming, wake) < LONG / 2
