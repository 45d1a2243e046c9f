"""A rank that fails, dies, freezes or is interrupted ends the run on every rank.

The ranks run the source of `program`: they loop over a collective until the bad one
does what its case says. A little over 400 lines, because all cases share that program.
"""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager

import pytest

from tests.support.launchers import mpirun_command, rank_environment
from tests.support.ranks import StartedCommands, run_commands, start_commands
from tests.support.waiting import LONG, until

# Seconds from the failure until every process has ended, on a host that may be busy:
# the 5 of the promise are what `make fault` shows.
END_WITHIN = 60.0

needs_ranks = pytest.mark.requires("ranks")


def program(transport: str, case: str, bad_rank: int) -> None:
    import ctypes
    import os
    import signal
    import sys
    import time

    import mlx.core as mx

    if case == "exit":
        from jaxtyping import install_import_hook

        # Annotations are checked here as in pytest's own process; in one case and two
        # modules only, because that takes longer than what is tested.
        modules = ["mlx_ep.comm.liveness", "mlx_ep.comm.launch"]
        install_import_hook(modules, "beartype.beartype")
    from mlx_ep.comm import Limits, guard, note_progress, note_step

    # A shell may have started the tests in the background, or under nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_nohup = case == "nohup"
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_nohup else signal.SIG_DFL)
    group = mx.distributed.init(strict=True, backend=transport)
    rank = group.rank()
    is_bad = rank == bad_rank

    def add() -> None:
        mx.eval(mx.distributed.all_sum(mx.ones(8), group=group))

    def now() -> None:
        print(f"event {time.time()}", flush=True)

    if case == "meet-late":  # as ranks on several hosts without a secret do
        from mlx_ep.comm import channel
        from mlx_ep.comm.control.meeting import Meeting

        channel.find_meeting = lambda *_: Meeting("late")
    if case == "meet-secret":
        os.environ["MLX_EP_SECRET"] = "of this test of ranks only"
    limits = {
        "hold-gil": Limits(interpreter=2.0),
        "pause": Limits(stopped=1.0, interpreter=2.0, decode=2.0),
        "late": Limits(decode=1.5),
    }.get(case, Limits())
    if case == "raise" and rank == bad_rank + 1:
        from mlx_ep.comm import liveness

        liveness.ROOT_CAUSE_GRACE = 60.0
    with guard(group, limits) as guarded:
        assert guarded is not None
        if case == "early" and is_bad:
            time.sleep(0.2)  # the others wait in their first collective
            now()
            raise FileNotFoundError("no such model")
        add()
        print("ready", flush=True)
        sys.stdout.write("not flushed\n")
        if case == "raise" and rank == bad_rank + 1:
            # As a collective does on a rank that sees first that a peer is gone.
            raise RuntimeError("connection to a peer was lost")
        if case == "leave":
            time.sleep(0.2 * ((rank - bad_rank) % group.size()))
            if rank == bad_rank:
                return
            sys.exit(0)
        if case == "leave-first" and rank == 0:
            return
        if case == "leave-first" and rank == 1:
            time.sleep(600)
        if case == "sleep" and is_bad:
            time.sleep(600)
        if is_bad and case not in ("loop", "nohup", "freeze", "pause", "diverge"):
            time.sleep(0.2)  # the others wait in a collective
            now()
        for number in range(40) if case == "diverge" else ():
            note_step(number if number < 20 or not is_bad else 0)
            add()
        if case == "diverge":
            time.sleep(600)
        if case in ("late", "pause"):
            note_progress("decode", 7)
        if case == "late" and is_bad:
            time.sleep(600)
        if is_bad and case in ("raise", "meet-late", "meet-secret"):
            raise ValueError("boom\nin two lines")
        if is_bad and case == "exit":
            sys.exit(2)
        if is_bad and case == "fail":
            guarded.fail("had enough", 7)
        if is_bad and case in ("kill", "leave-first"):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_bad and case == "hold-gil":
            ctypes.PyDLL(None).sleep(600)
        step = 7
        while True:
            add()
            if case == "pause":
                step += 1
                note_progress("decode", step)
                time.sleep(0.05)
                if step % 10 == 0:
                    print(step, flush=True)


def argv(transport: str, case: str, bad_rank: int) -> list[str]:
    # Not this file: to import pytest takes a rank longer than most of its cases.
    source = inspect.getsource(program)
    return [sys.executable, "-c", f"{source}program{(transport, case, bad_rank)}"]


def ring(
    num_ranks: int, case: str, bad_rank: int
) -> AbstractContextManager[StartedCommands]:
    # Buffered: what a rank printed must be out however it ends.
    buffered = {"PYTHONUNBUFFERED": ""}
    return start_commands(num_ranks, argv("ring", case, bad_rank), env=buffered)


def wait_ready(started: StartedCommands) -> float:
    ranks = range(len(started.processes))
    until(lambda: all("ready" in started.outcome(rank).stdout for rank in ranks))
    time.sleep(0.2)
    return time.time()


def check_ended(
    started: StartedCommands,
    reason: str,
    event: float | None = None,
    silent: int | None = None,
) -> list[int | None]:
    """Every rank ends in time and in failure, and all but `silent` say why."""
    outcomes = started.wait()
    end = time.time()
    for rank, outcome in enumerate(outcomes):
        print(f"--- rank {rank}: {outcome}")
        words = outcome.stdout.split()
        event = float(words[words.index("event") + 1]) if "event" in words else event
        assert outcome.returncode not in (0, None)
        if rank != silent:
            assert reason in outcome.stderr
            assert "ready" not in words or "not flushed" in outcome.stdout
    assert event is not None
    print(f"ENDED in {end - event:.2f} s: {reason}")
    assert end - event < END_WITHIN
    return [outcome.returncode for outcome in outcomes]


@needs_ranks
def test_an_exception_on_one_rank_ends_all() -> None:
    with ring(4, "raise", 2) as started:
        reason = "rank 2 failed: ValueError: boom in two lines"
        assert check_ended(started, reason) == [1] * 4
        for rank in range(4):
            has_traceback = "Traceback" in started.outcome(rank).stderr
            assert has_traceback == (rank == 2)


@needs_ranks
@pytest.mark.parametrize("case", ["meet-late", "meet-secret"])
def test_watches_meet_without_a_file(case: str) -> None:
    with ring(3, case, 2) as started:
        reason = "rank 2 failed: ValueError: boom in two lines"
        assert check_ended(started, reason) == [1] * 3


@needs_ranks
def test_an_exception_before_the_first_collective_ends_all() -> None:
    with ring(2, "early", 1) as started:
        check_ended(started, "rank 1 failed: FileNotFoundError: no such model")


@needs_ranks
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_killed_rank_ends_all(bad_rank: int) -> None:
    with ring(3, "kill", bad_rank) as started:
        check_ended(started, f"rank {bad_rank} ended without a word", silent=bad_rank)


@needs_ranks
def test_sigint_to_one_rank_ends_all() -> None:
    with ring(2, "loop", 1) as started:
        event = wait_ready(started)
        started.processes[1].send_signal(signal.SIGINT)
        reason = "rank 1 was interrupted (Ctrl-C)"
        assert check_ended(started, reason, event) == [130] * 2
        assert "Traceback" not in started.outcome(1).stderr


@needs_ranks
@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (signal.SIGINT, "interrupted (Ctrl-C)", 130),
        (signal.SIGTERM, "told to end (SIGTERM)", 143),
        (signal.SIGHUP, "told to end (SIGHUP)", 129),
    ],
)
def test_a_signal_while_stuck_in_a_collective_ends_all(
    number: int, words: str, code: int
) -> None:
    with ring(2, "sleep", 1) as started:
        event = wait_ready(started)
        started.processes[0].send_signal(number)
        assert check_ended(started, f"rank 0 was {words}", event) == [code] * 2


@needs_ranks
def test_under_nohup_sigterm_ends_all_and_sighup_does_not() -> None:
    with ring(2, "nohup", 0) as started:
        event = wait_ready(started)
        started.processes[1].send_signal(signal.SIGHUP)
        started.processes[1].send_signal(signal.SIGTERM)
        reason = "rank 1 was told to end (SIGTERM)"
        assert check_ended(started, reason, event) == [143] * 2
        assert "Traceback" not in started.outcome(1).stderr


@needs_ranks
def test_sigint_to_all_ends_all() -> None:
    with ring(2, "loop", 0) as started:
        event = wait_ready(started)
        for process in started.processes:
            process.send_signal(signal.SIGINT)
        assert check_ended(started, "was interrupted", event) == [130] * 2


@needs_ranks
def test_a_frozen_rank_ends_all() -> None:
    with ring(2, "freeze", 1) as started:
        event = wait_ready(started)
        started.processes[1].send_signal(signal.SIGSTOP)
        reason = "rank 1 stopped 4 s ago"
        codes = check_ended(started, reason, event, silent=1)
        assert codes[1] == -signal.SIGKILL  # by its watch: it could do nothing itself
        report = started.outcome(0).stderr
        assert "rank 1: running, for" in report and "; stopped" in report
        assert "stacks of rank 0:" in report and "stacks of rank 1:" in report


@needs_ranks
def test_ranks_that_are_all_stopped_go_on_afterwards() -> None:
    with ring(2, "pause", 1) as started:  # Ctrl-Z, of which one rank hears first
        event = wait_ready(started)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in started.processes:
                process.send_signal(number)
                time.sleep(0.2)
            before = started.outcome(0).stdout
            time.sleep(4.0 if number == signal.SIGSTOP else 1.5)
        assert [process.poll() for process in started.processes] == [None] * 2
        assert len(started.outcome(0).stdout) > len(before)  # it goes on
        started.processes[1].send_signal(signal.SIGSTOP)
        reason = "rank 1 stopped 1 s ago"
        check_ended(started, reason, time.time(), silent=1)
    assert event


@needs_ranks
def test_ranks_that_part_are_ended() -> None:
    with ring(2, "diverge", 1) as started:
        event = wait_ready(started)
        reason = "has computed something else than rank"
        assert check_ended(started, reason, event) == [1] * 2
        assert "by step 24 (their tokens or lengths differ)" in (
            started.outcome(0).stderr
        )


@needs_ranks
def test_a_rank_that_is_late_ends_all() -> None:
    with ring(2, "late", 1) as started:
        reason = "no rank has come further for 1.5 s; rank 0 is in decode, step 7"
        assert check_ended(started, reason) == [1] * 2
        report = started.outcome(0).stderr
        assert "rank 1: decode, step 7, for" in report
        assert "stacks of rank 1:" in report and "in program" in report


@needs_ranks
def test_a_rank_that_holds_the_gil_for_good_is_ended_too() -> None:
    report = "(no answer)"
    for _ in range(3):  # on a loaded host a stack may take longer than it is waited for
        if "(no answer)" not in report:
            break
        with ring(2, "hold-gil", 0) as started:
            check_ended(started, "the interpreter of rank 0 has not answered for 2 s")
            report = started.outcome(0).stderr
        assert "rank 0: running, for" in report and "interpreter silent for" in report
    assert "in program" in report  # the stack of the thread that holds it


@needs_ranks
@pytest.mark.parametrize(("case", "bad_rank", "code"), [("exit", 1, 2), ("fail", 0, 7)])
def test_an_exit_code_reaches_all(case: str, bad_rank: int, code: int) -> None:
    with ring(2, case, bad_rank) as started:
        assert check_ended(started, f"rank {bad_rank} failed: ") == [code] * 2


@needs_ranks
def test_a_normal_end_is_no_failure() -> None:
    with ring(3, "leave", 0) as started:  # rank 0 returns, the others sys.exit(0)
        outcomes = started.wait()
    assert [(o.returncode, o.stderr) for o in outcomes] == [(0, "")] * 3


@needs_ranks
def test_rank_0_relays_after_its_own_end() -> None:
    with ring(3, "leave-first", 2) as started:
        check_ended(started, "rank 2 ended without a word", silent=2)


WRONG_ON_ONE = """
import os, sys
from mlx_ep import cli
from mlx_ep.generate.__main__ import main
if os.environ["MLX_RANK"] == "1":
    if {flag!r}:
        sys.argv.append({flag!r})
    else:
        def read_text(*_): raise ValueError("no room for it")
        cli.read_text = read_text
sys.argv[0] = "mlx_ep.generate"
main()
"""


@needs_ranks
@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("", "no room for it"),
    ],
    ids=["before the group", "in the body"],
)
def test_wrong_usage_on_one_rank_ends_all(flag: str, text: str) -> None:
    command = [sys.executable, "-c", WRONG_ON_ONE.format(flag=flag)]
    outcomes = run_commands(2, command)
    assert [outcome.returncode for outcome in outcomes] == [2, 2]
    for outcome in outcomes:
        (line,) = outcome.stderr.strip().splitlines()
        assert "wrong usage on rank 1: " in line and text in line


@pytest.mark.requires("mpi")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("raise", "rank 1 failed: ValueError: boom"),
        ("kill", ""),  # mpirun may end rank 0 before it has a word
        ("leave", None),
    ],
)
def test_over_mpi(case: str, reason: str | None) -> None:
    command, variables = mpirun_command(2)
    done = subprocess.run(
        [*command, *argv("mpi", case, 1)],
        env=rank_environment(variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    end = time.time()
    print(done)
    assert (done.returncode == 0) == (reason is None)
    if reason is not None:
        assert reason in done.stderr
        words = done.stdout.split()
        seconds = end - float(words[words.index("event") + 1])
        print(f"ENDED in {seconds:.2f} s over MPI: {case}")
        assert seconds < END_WITHIN


def test_one_rank_needs_no_guard(capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_ep.comm.liveness import guard

    with pytest.raises(KeyError), guard() as channel:
        assert channel is None
        raise KeyError("as without guard")
    with pytest.raises(SystemExit) as exit_info, guard():
        raise KeyboardInterrupt
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "[mlx_ep] interrupted (Ctrl-C)\n"
