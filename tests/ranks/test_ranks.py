"""Tests of the harness that runs code on several ranks."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from tests.support import forked, ranks
from tests.support.forked import can_fork, other_variables
from tests.support.launchers import rank_environment
from tests.support.ranks import RanksError, run_commands, run_ranks, start_commands
from tests.support.waiting import LONG, until

pytestmark = pytest.mark.requires("ranks")

WAITING = """
import sys, mlx.core as mx
group = mx.distributed.init(strict=True, backend="ring")
print("line", sys.stdin.readline().strip(), group.rank(), flush=True)
if group.rank() == 0:
    mx.eval(mx.distributed.recv((1,), mx.int32, 1, group=group))
else:
    import time
    time.sleep(60)
"""


def wait_for_lines(started):
    until(lambda: all("line" in started.outcome(r).stdout for r in range(2)))


def rank_and_sum(group, offset):
    total = mx.distributed.all_sum(mx.array(group.rank() + offset), group=group)
    return group.rank(), group.size(), np.array(total)


def raise_on_rank_one(group):
    if group.rank() == 1:
        raise ValueError("the second rank is unhappy")
    mx.eval(mx.distributed.all_sum(mx.array(1), group=group))


def parent(group):
    return os.getppid()


def wait_for_ever(group, folder):
    a_function_that_hangs(group, folder)


def a_function_that_hangs(group, folder):
    (Path(folder) / str(group.rank())).touch()
    if group.rank() == 0:
        mx.eval(mx.distributed.recv((1,), mx.int32, 1, group=group))
    time.sleep(60)


def test_all_workers_of_one_pytest_fork_from_one_process(monkeypatch):
    first = run_ranks(1, parent)
    with forked._server.__wrapped__("checked") as of_another_worker:
        monkeypatch.setattr(forked, "_server", lambda kind: of_another_worker)
        assert run_ranks(1, parent) == first
    monkeypatch.undo()  # a worker that ends leaves the others theirs
    assert run_ranks(1, parent) == first


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "transport", ["ring", pytest.param("mpi", marks=pytest.mark.requires("mpi"))]
)
def test_results_come_in_rank_order(num_ranks, transport):
    results = run_ranks(num_ranks, rank_and_sum, 10, transport=transport)
    expected = sum(10 + rank for rank in range(num_ranks))
    assert [(r, p) for r, p, _ in results] == [
        (rank, num_ranks) for rank in range(num_ranks)
    ]
    assert all(total == expected for _, _, total in results)


@pytest.mark.parametrize(
    "transport", ["ring", pytest.param("mpi", marks=pytest.mark.requires("mpi"))]
)
def test_a_rank_that_raises_fails_the_run(transport):
    with pytest.raises(RanksError, match="the second rank is unhappy") as error:
        run_ranks(2, raise_on_rank_one, transport=transport)
    assert "a rank failed" in str(error.value)  # it is not waited for to the end
    assert "--- rank 0 ---" in str(error.value)


@pytest.mark.parametrize(
    "transport", ["ring", pytest.param("mpi", marks=pytest.mark.requires("mpi"))]
)
def test_a_rank_that_hangs_shows_its_stack(transport, tmp_path, monkeypatch):
    def monotonic():
        """A clock that goes on when both ranks hang."""
        return time.monotonic() + 2 * LONG * (len(list(tmp_path.iterdir())) == 2)

    clock = SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
    monkeypatch.setattr(ranks, "time", clock)
    with pytest.raises(RanksError, match="not done after") as error:
        run_ranks(2, wait_for_ever, str(tmp_path), transport=transport)
    # One rank waits inside mlx, the other in Python.
    assert str(error.value).count("in a_function_that_hangs") == 2


def test_commands_give_each_rank_its_own_outcome():
    script = (
        "import sys, mlx.core as mx\n"
        "group = mx.distributed.init(strict=True, backend='ring')\n"
        "print('rank', group.rank(), sys.stdin.read())\n"
        "print('error', group.rank(), file=sys.stderr)\n"
        "mx.eval(mx.distributed.all_sum(mx.array(1), group=group))\n"
        "sys.exit(3 * group.rank())\n"
    )
    outcomes = run_commands(2, [sys.executable, "-c", script], stdin="hello")
    assert [outcome.returncode for outcome in outcomes] == [0, 3]
    assert [o.stdout for o in outcomes] == ["rank 0 hello\n", "rank 1 hello\n"]
    assert ["error 0" in outcomes[0].stderr, "error 1" in outcomes[1].stderr] == [
        True,
        True,
    ]


def test_commands_that_hang_show_their_stacks():
    with start_commands(2, [sys.executable, "-c", WAITING]) as started:
        wait_for_lines(started)
        with pytest.raises(RanksError, match="did not end within") as error:
            started.wait(timeout=0)
    assert str(error.value).count('File "<string>"') == 2


def test_a_started_rank_can_be_killed():
    with start_commands(2, [sys.executable, "-c", WAITING], stdin="x\n") as started:
        wait_for_lines(started)
        started.processes[1].kill()
        assert started.processes[1].wait(LONG) == -signal.SIGKILL
    assert all(process.poll() is not None for process in started.processes)


def test_no_ranks_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run_ranks(0, rank_and_sum, 1)


ENDS_LATE = """
import atexit, os, sys, threading, time
atexit.register(print, "left")
print(__name__, sys.argv, sys.path[0], sys.stdin.read(), os.getcwd())
class Ended(Exception): pass
if "raise" in sys.argv: raise Ended("so")
if "kill" in sys.argv: os.kill(os.getpid(), 9)
if "message" in sys.argv: sys.exit("why")
if "interrupted" in sys.argv: raise KeyboardInterrupt
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
if "normal" not in sys.argv: sys.exit(3)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ["-c", ENDS_LATE, "x"],
        *(
            ["-c", ENDS_LATE, how]
            for how in ("raise", "kill", "message", "interrupted", "normal")
        ),
        ["-m", "mlx_ep", "--help"],
        ["-m", "mlx_ep.generate", "--no-such-flag"],
    ],
    ids=lambda argv: " ".join(argv).replace(ENDS_LATE, ""),
)
def test_a_forked_command_is_like_one_that_was_started(argv: list[str]) -> None:
    command = [sys.executable, *argv]
    assert not other_variables(rank_environment(None)), "a test has left them"
    assert can_fork(command, rank_environment(None))
    found, expected = (
        run_commands(1, command, stdin="text", forks=forks)[0]
        for forks in (True, False)
    )
    assert found.returncode == expected.returncode
    assert found.stdout == expected.stdout
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]
