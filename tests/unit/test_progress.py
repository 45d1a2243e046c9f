"""What a user sees while a rank reads, makes or checks something."""

from __future__ import annotations

import io
import logging
import re
from contextlib import contextmanager

import mlx.core as mx
import pytest

from mlx_ep.api import load
from mlx_ep.launch.bars import bar_of, drawn
from mlx_ep.loading import checkpoint_weights, dummy_weights, find_model, weights
from mlx_ep.loading.progress import BARS, watch_phase
from mlx_ep.tune import cache


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BARS, raising=False)


def test_a_terminal_gets_a_bar_for_each_rank(monkeypatch) -> None:
    shown = []
    for rank in range(2):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        with watch_phase("loading", 4_000_000, rank) as advance:
            for _ in range(5):  # more than there is: the bar stays within
                advance(1_000_000)
        shown.append(terminal.getvalue())
    assert "rank 0 loading:" in shown[0] and "4.00M/4.00M" not in shown[1][:80]
    assert shown[1].startswith("\n") and not shown[0].startswith("\n")  # its own line
    assert "?" in shown[0] or "B/s" in shown[0]


def test_elsewhere_a_line_for_each_phase(monkeypatch, caplog) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "mlx_ep"):
        with watch_phase("fetching", 3_000_000, 1, done=1_000_000, of=" of me/it"):
            pass
        monkeypatch.setattr("mlx_ep.loading.progress._WORTH_A_LINE", -1.0)
        with watch_phase("warm-up", 2, 0, "shapes"):
            pass
        with watch_phase("loading", 0, 0):
            pass
    first, second, third = [record.getMessage() for record in caplog.records]
    assert first == "rank 1: fetching 2.00 MB of me/it"
    assert second == "rank 0: warm-up 2 shapes"
    assert third.startswith("rank 0: warm-up done, ")


def test_the_launcher_draws_what_a_rank_writes_into_its_pipe(monkeypatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    monkeypatch.setenv(BARS, "80")
    with watch_phase("loading", 100, 1) as advance:
        advance(50)
    written = pipe.getvalue()
    assert "\n" not in written  # the launcher places it
    assert max(map(len, written.split("\r"))) <= 79
    bar, rest = bar_of(written.encode())
    assert bar is not None and not bar.strip() and rest == b"\r"  # it has ended


@pytest.mark.parametrize(
    "rest, expected",
    [
        (b"a line without an end", (None, b"a line without an end")),
        (b"before\r 10%", (b" 10%", b"\r 10%")),
        (b"\r 10%\r 20%", (b" 20%", b"\r 20%")),
        (b"\r 10%\r    \r", (b"    ", b"\r")),
        (b"text\r", (None, b"text\r")),  # half of an end of line
    ],
)
def test_the_newest_state_of_a_bar(rest, expected) -> None:
    assert bar_of(rest) == expected


def test_a_bar_is_drawn_below_and_the_cursor_put_back() -> None:
    assert drawn(b" 50%|## ", 2, 80) == b"\n\n\r 50%|##\x1b[K\x1b[2A\r"
    assert drawn(b"x" * 100, 0, 10) == b"\r" + b"x" * 9 + b"\x1b[K\r"


@pytest.mark.parametrize("make", [checkpoint_weights, dummy_weights])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_bar_gets_as_far_as_it_said(make, num_ranks, monkeypatch) -> None:
    """All bytes are told of, none twice."""
    told = []

    @contextmanager
    def watched(what, total, rank, *more):
        done = []
        yield done.append
        told.append((what, total, sum(done)))

    monkeypatch.setattr(weights, "watch_phase", watched)
    for rank in range(num_ranks):
        make(find_model("jargon-moe"), rank, num_ranks).build(None)
    assert len(told) == num_ranks
    for _, total, done in told:
        assert total == done > 1_000_000


def test_loading_says_its_phases(monkeypatch, caplog, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(tmp_path) in str(cache.cache_folder())
    mx.random.seed(0)
    with caplog.at_level(logging.INFO, "mlx_ep"):
        load("jargon-moe")
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("rank 0: loading 7.6") for line in said), said
    assert any(re.match(r"rank 0: warm-up \d shapes", line) for line in said), said
