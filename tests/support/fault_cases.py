"""What `make fault` combines, what it looks at, its log and its table."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.launchers import unavailable

POINTS = ("before", "loading", "warmup", "prefill", "decode")
FAULTS = (
    "SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT", "exception", "os._exit", "deadline",
    "network",
)  # fmt: skip
SETUPS = {"ring 2": 2, "ring 3": 3, "mpi 2": 2}
MOST = {"SIGTERM": 2.0, "SIGINT": 2.0, "exception": 5.0, "os._exit": 5.0}
MOST_OTHERS = 10.0  # seconds from the fault until every rank has ended


@dataclass(frozen=True)
class Case:
    """One combination."""

    setup: str
    point: str
    fault: str
    rank: int

    def __str__(self) -> str:
        return f"{self.setup}, {self.point}, {self.fault} on rank {self.rank}"


@dataclass(frozen=True)
class Outcome:
    """What a combination left."""

    case: Case
    seconds: float
    codes: list[int | None]
    has_report: bool
    orphans: list[str]
    taken_ports: list[int]
    output: str

    @property
    def problems(self) -> list[str]:
        most = MOST.get(self.case.fault, MOST_OTHERS)
        found = []
        if not self.seconds <= most:
            found.append(f"ended after {self.seconds:.1f} s, more than {most:g} s")
        if not all(self.codes):
            found.append(f"exit codes {self.codes}")
        if not self.has_report:
            found.append("no report")
        if self.orphans:
            found.append(f"left {self.orphans}")
        if self.taken_ports:
            found.append(f"ports {self.taken_ports} are taken")
        return found


def cases() -> list[Case]:
    """All combinations this host can run."""
    is_root = os.geteuid() == 0 and sys.platform == "linux"
    has_mpi = unavailable("mpi") is None
    return [
        Case(setup, point, fault, rank)
        for setup, size in SETUPS.items()
        for fault in FAULTS
        for rank in (0, size - 1)
        for point in POINTS  # an odd number, so that --every 2 meets both ranks
        # mpirun starts its ranks in one network namespace.
        if not (fault == "network" and (setup == "mpi 2" or not is_root))
        and not (setup == "mpi 2" and not has_mpi)
    ]


def table(outcomes: list[Outcome]) -> str:
    """Seconds until every rank had ended: a fault of rank 0 / of the last rank."""
    by_case = {outcome.case: outcome for outcome in outcomes}
    seconds = [outcome.seconds for outcome in outcomes]
    good = sum(not outcome.problems for outcome in outcomes)
    orphans = sum(bool(outcome.orphans) for outcome in outcomes)
    ports = sum(bool(outcome.taken_ports) for outcome in outcomes)
    lines = [
        f"{len(outcomes)} combinations, {good} as promised: the slowest ended "
        f"everywhere {max(seconds):.1f} s after the fault (a deadline: after it "
        f"passed), {sum(all(o.codes) for o in outcomes)} with non-zero exit codes on "
        f"every rank, {sum(o.has_report for o in outcomes)} with a report, "
        f"{orphans} with a process left, {ports} with a port left.",
        "",
        "| group | fault | before the group | loading | warm-up | prefill | decode |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setup, size in SETUPS.items():
        for fault in FAULTS:
            cells = []
            for point in POINTS:
                found = [
                    by_case.get(Case(setup, point, fault, rank))
                    for rank in (0, size - 1)
                ]
                shown = [f"{it.seconds:.1f}" if it else "-" for it in found]
                cells.append(" / ".join(shown))
            if any(cell != "- / -" for cell in cells):
                lines.append(f"| {setup} | {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(path: Path, text: str) -> None:
    """Puts the table between the two comments of a page that are for it."""
    begin, end = "<!-- make fault: begin -->", "<!-- make fault: end -->"
    page = path.read_text()
    before, rest = page.split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def this_commit() -> str:
    """What is tested: the commit, and a digest of what is changed in the package."""

    def git(*words: str) -> bytes:
        found = subprocess.run(["git", *words], capture_output=True, check=False)
        return found.stdout.strip()

    changes = git("diff", "HEAD", "--", "mlx_ep", "tests/support")
    name = git("rev-parse", "HEAD").decode() or "unknown"
    return name + (f"+{hashlib.sha256(changes).hexdigest()[:12]}" if changes else "")


def read_log(path: Path, commit: str) -> dict[Case, Outcome]:
    """The combinations in a log that were as promised, of one commit."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that was cut off
            record = json.loads(line)
            if record.pop("commit") == commit:
                outcome = Outcome(**record | {"case": Case(**record["case"])})
                if not outcome.problems:
                    found[outcome.case] = outcome
    return found
