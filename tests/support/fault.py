"""Every way for a rank to fail, at every point of a run, on every kind of group.

    python -m tests.support.fault [--only TEXT] [--every N] [--resume] [--jobs N]
                                  [--log FILE] [--write FILE]

Each combination starts `mlx_ep.generate` on the embedded model, lets one rank fail and
looks at what is left: the seconds until every rank has ended, exit codes, the report of
rank 0, processes that live on, ports that stay taken. Exit code 1 if one falls short.

Each combination is a line of the log when it ends. After an interruption `--resume`
takes from there what was as promised, if it is of the same commit, and runs the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tests.support.fault_cases import (
    FAULTS,
    SETUPS,
    Case,
    Outcome,
    cases,
    read_log,
    table,
    this_commit,
    write_table,
)
from tests.support.launchers import (
    mpirun_command,
    rank_environment,
    ring_variables,
)

DEADLINE = 4.0  # seconds, of the phase in which a rank is late
ORPHAN_LIMIT = 6.0  # seconds after that for the watches to end
WAITING = ("SIGSTOP", "deadline", "network")  # for a limit, not for a core
LOG = Path("fault.jsonl")
NAME = "MLX_EP_FAULT"  # marks the processes of one combination
SIGNALS = {name: getattr(signal, name) for name in FAULTS if name.startswith("SIG")}


# A rank ------------------------------------------------------------------------------


def rank_main() -> None:
    """What each rank runs: the command, which fails where the case says."""
    case = Case(**json.loads(os.environ[NAME + "_CASE"]))
    marker = Path(os.environ[NAME])
    variables = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
    rank = next(int(os.environ[name]) for name in variables if name in os.environ)
    (marker.parent / f"pid.{rank}").write_text(str(os.getpid()))
    # A shell may have started this in the background, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from mlx_ep.comm.channel import Liveness
    from mlx_ep.comm.control.progress import ProgressPage
    from mlx_ep.generate import main

    say = ProgressPage.at

    def at(page: ProgressPage, *args: Any, **kwargs: Any) -> None:
        say(page, *args, **kwargs)
        if rank == case.rank and not marker.exists() and is_there(page.read()):
            if case.fault == "network":  # what never was connected cannot be cut
                assert Liveness.current is not None
                Liveness.current.wait_joined()
            marker.write_text(str(time.time()))
            fail(case.fault)

    def is_there(place: Any) -> bool:
        if case.point == "before":
            return place.stage == "waiting for all ranks"
        return place.phase == case.point and (place.phase != "decode" or place.step > 3)

    ProgressPage.at = at  # type: ignore[method-assign]
    sys.argv = ["mlx_ep.generate", "--prompt", "What is spaghetti code?"]
    main()


def fail(fault: str) -> None:
    """Lets this rank fail."""
    if fault in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault])
    elif fault == "exception":
        raise ArithmeticError("a fault")
    elif fault == "os._exit":
        os._exit(3)
    elif fault == "deadline":
        time.sleep(600)
    elif fault == "network":
        time.sleep(1.0)  # it is cut meanwhile


# The other side ---------------------------------------------------------------------


def run_case(case: Case) -> Outcome:
    """Runs one combination and looks at what is left of it."""
    with tempfile.TemporaryDirectory(prefix="fault-") as name:
        directory = Path(name)
        marker = directory / "marker"
        variables = {
            NAME: str(marker),
            NAME + "_CASE": json.dumps(asdict(case)),
            "XDG_CACHE_HOME": str(Path(tempfile.gettempdir()) / "mlx-ep-tests"),
            "HF_HUB_OFFLINE": "1",
        }
        if case.fault == "deadline":
            phase = "starting" if case.point == "before" else case.point
            variables["MLX_EP_LIMITS"] = f"{phase}={DEADLINE:g}"
        with contextlib.ExitStack() as stack:
            start = {"mpi 2": start_mpi}.get(case.setup, start_ring)
            if case.fault == "network":
                start = start_in_namespaces
            processes, ports, cut = start(case, directory, variables, stack)
            stack.callback(end_all, processes, str(marker))
            seconds = wait(case, directory, processes, marker, cut)
            orphans = wait_for_orphans(str(marker))
            taken = [port for port in ports if not is_free(port)]
            end_all(processes, str(marker))
            outputs = [
                path.read_text(errors="replace")
                for path in sorted(directory.glob("stderr.*"))
            ]
        report = f"[mlx_ep] rank 0 ends: rank {case.rank} "
        if case.rank == 0:
            report = "[mlx_ep] rank 0 "
        if case.fault in ("network", "deadline"):
            report = "[mlx_ep] rank 0 ends: "  # who is behind is for the report to say
        reports = [report]
        if case.setup == "mpi 2" and case.point == "before":
            # mpirun may have ended rank 0 while it was still importing.
            reports.append(f"[mlx_ep] rank {case.rank} ")
        return Outcome(
            case,
            seconds,
            [process.returncode for process in processes],
            any(text in outputs[0] for text in reports),
            orphans,
            taken,
            "\n".join(outputs),
        )


_NUMBERS = itertools.count()
Started = tuple[list[subprocess.Popen[bytes]], list[int], Any]
_COMMAND = [sys.executable, "-m", "tests.support.fault", "--rank"]


def start_ring(
    case: Case,
    directory: Path,
    variables: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> Started:
    ranks = ring_variables(SETUPS[case.setup], directory)
    hosts = json.loads((directory / "hostfile").read_text())
    processes = [
        popen(_COMMAND, rank, directory, {**variables, **own}, stack)
        for rank, own in enumerate(ranks)
    ]
    return processes, [int(host.rpartition(":")[2]) for (host,) in hosts], None


def start_mpi(
    case: Case,
    directory: Path,
    variables: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> Started:
    argv, more = mpirun_command(2)
    names = [item for name in variables for item in ("-x", name)]
    command = [*argv[:-1], *names, "--", *_COMMAND]
    return [popen(command, 0, directory, {**variables, **more}, stack)], [], None


def start_in_namespaces(
    case: Case,
    directory: Path,
    variables: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> Started:
    """Each rank in a network namespace of its own, all on one bridge."""
    size = SETUPS[case.setup]
    # A name of its own for each: a namespace goes some time after it is deleted.
    bridge = f"f{os.getpid() % 10000}n{next(_NUMBERS)}"
    run_ip(f"link add {bridge} type bridge")
    stack.callback(run_ip, f"link del {bridge}")
    run_ip(f"link set {bridge} up")
    for rank in range(size):
        space = f"{bridge}-{rank}"
        run_ip(f"netns add {space}")
        stack.callback(run_ip, f"netns del {space}")
        run_ip(f"link add {bridge}v{rank} type veth peer name eth0 netns {space}")
        run_ip(f"link set {bridge}v{rank} master {bridge} up")
        run_ip(f"-n {space} addr add 10.77.0.{rank + 1}/24 dev eth0")
        run_ip(f"-n {space} link set eth0 up")
        run_ip(f"-n {space} link set lo up")
    hosts = [[f"10.77.0.{rank + 1}:5001"] for rank in range(size)]
    (directory / "hostfile").write_text(json.dumps(hosts))
    processes = []
    for rank in range(size):
        own = {
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(directory / "hostfile"),
            "MLX_EP_SECRET": "of this test of faults only",
        }
        command = ["ip", "netns", "exec", f"{bridge}-{rank}", *_COMMAND]
        processes.append(popen(command, rank, directory, {**variables, **own}, stack))

    def cut() -> None:
        run_ip(f"link set {bridge}v{case.rank} down")

    return processes, [], cut


def run_ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


def popen(
    command: list[str],
    rank: int,
    directory: Path,
    variables: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> subprocess.Popen[bytes]:
    stderr = stack.enter_context((directory / f"stderr.{rank}").open("wb"))
    return subprocess.Popen(
        command,
        env=rank_environment(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def wait(
    case: Case,
    directory: Path,
    processes: list[subprocess.Popen[bytes]],
    marker: Path,
    cut: Any,
) -> float:
    """Seconds from the fault until every rank has ended; infinite if it does not."""
    limit = time.monotonic() + 60
    while not marker.exists() or not marker.read_text():
        if time.monotonic() > limit or all(p.poll() is not None for p in processes):
            return float("inf")  # the fault never came
        time.sleep(0.005)
    event = float(marker.read_text())
    if cut is not None:
        cut()
    if case.fault == "deadline":
        event += DEADLINE
    while time.time() < event + 40:
        if all(p.poll() is not None for p in processes) and not living(directory):
            return time.time() - event
        time.sleep(0.005)
    return float("inf")


def living(directory: Path) -> list[int]:
    """The ranks' processes that still run; mpirun can end before them."""
    pids = [int(path.read_text() or 0) for path in directory.glob("pid.*")]
    return [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def wait_for_orphans(marker: str) -> list[str]:
    """Processes of the combination that live on, watches included."""
    limit = time.monotonic() + ORPHAN_LIMIT
    while (found := list(processes_of(marker))) and time.monotonic() < limit:
        time.sleep(0.05)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return [str(process) for process in found]


def end_all(processes: list[subprocess.Popen[bytes]], marker: str) -> None:
    """Nothing of a combination is left, also when this is interrupted."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    for other in processes_of(marker):
        with contextlib.suppress(psutil.Error):
            other.kill()


def processes_of(marker: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get(NAME) == marker
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return True
    return False


def run_all(todo: list[Case], jobs: int) -> Iterator[Outcome]:
    """The outcomes as they end; what passes most of its time waiting, side by side."""
    side_by_side = [case for case in todo if jobs > 1 and case.fault in WAITING]
    yield from map(run_case, [case for case in todo if case not in side_by_side])
    pool = ThreadPoolExecutor(jobs)
    try:
        for done in as_completed(pool.submit(run_case, case) for case in side_by_side):
            yield done.result()
    finally:  # after an interruption those that run are waited for
        pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.support.fault", description=__doc__)
    parser.add_argument("--only", default="", help="Cases with this text in the name.")
    parser.add_argument("--every", type=int, default=1, help="Each Nth of them.")
    parser.add_argument("--resume", action="store_true", help="Run what is missing.")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="So many at once, of those that pass their time waiting.",
    )
    parser.add_argument("--log", type=Path, default=LOG, help="A line per combination.")
    parser.add_argument("--write", type=Path, help="The page that gets the table.")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main()
        return
    chosen = [case for case in cases() if args.only in str(case)][:: args.every]
    this = this_commit()
    known = read_log(args.log, this) if args.resume else {}
    outcomes = [known[case] for case in chosen if case in known]
    todo = [case for case in chosen if case not in known]
    print(f"{len(outcomes)} in {args.log}, {len(todo)} to run", flush=True)
    with args.log.open("a" if args.resume else "w") as log:
        for outcome in run_all(todo, args.jobs):
            outcomes.append(outcome)
            words = "; ".join(outcome.problems) or "ok"
            log.write(json.dumps({**asdict(outcome), "commit": this}) + "\n")
            log.flush()
            print(
                f"{len(outcomes)}/{len(chosen)} {outcome.case}: "
                f"{outcome.seconds:.2f} s, {outcome.codes}, {words}",
                flush=True,
            )
            if outcome.problems:
                print(outcome.output, flush=True)
    text = table(outcomes)
    print(text)
    if args.write is not None:
        write_table(args.write, text)
    sys.exit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()
