"""Ranks that mpirun starts."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_ep.launch.words import SECRET, command, entries, exit_code


def find_mpirun() -> str | None:
    """The mpirun of this Python's environment, activated or not, else on the PATH."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun")


def _mpi_library(mpirun: str) -> dict[str, str]:
    """Variables by which MLX finds the libmpi beside an mpirun."""
    folder = Path(mpirun).resolve().parent.parent / "lib"
    for pattern in ("libmpi.so.[0-9]*", "libmpi.[0-9]*.dylib", "libmpi.dylib"):
        if found := sorted(folder.glob(pattern)):
            name = (
                "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
            )
            paths = [str(folder), os.environ.get(name, "")]
            path = os.pathsep.join(each for each in paths if each)
            return {"MLX_MPI_LIBNAME": found[0].name, name: path}
    return {}


def run_mpi(args: argparse.Namespace) -> int:
    """The exit code of mpirun, which is that of the first rank that fails."""
    mpirun = find_mpirun()
    assert mpirun is not None
    library = _mpi_library(mpirun)
    os.environ.update(library)
    os.environ.setdefault(SECRET, secrets.token_hex(16))
    given = [entry.partition("=")[0] for entry in entries(args)]
    names = [SECRET, *library, *given]
    for entry in entries(args):
        name, _, value = entry.partition("=")
        os.environ[name] = value
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as file:
        hosts = [host.ssh for host in args.hosts.ranks]
        for name in dict.fromkeys(hosts):
            print(f"{name} slots={hosts.count(name)}", file=file)
        file.flush()
        words = [
            mpirun, "-n", str(len(hosts)), "--hostfile", file.name,
            *(["-wdir", args.cwd] if args.cwd else []),
            *(word for name in names for word in ("-x", name)),
            *(word for arg in args.mpi_arg for word in shlex.split(arg)),
            *command(args, all(host.is_here for host in args.hosts.ranks)),
        ]  # fmt: skip
        with subprocess.Popen(words) as process:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda n, _: process.send_signal(n))
            return exit_code(process.wait())
