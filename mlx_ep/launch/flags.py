"""The flags of ``mlx_ep.launch``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_ep import cli
from mlx_ep.cli.hosts import BACKENDS, list_hosts, read_hostfile
from mlx_ep.launch.mpi import find_mpirun
from mlx_ep.launch.transport import FIRST_PORT


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.launch",
        usage="mlx_ep.launch [options] -- COMMAND ...",
        description="Start a command on every rank, such as mlx_ep.launch -n 2 -- "
        "mlx_ep.generate. The exit code is that of the rank that failed first.",
    )
    parser.add_argument(
        "-n",
        type=cli.positive,
        metavar="N",
        help="Ranks on each of --hosts (default: 1).",
    )
    parser.add_argument(
        "--hosts",
        help="Names or addresses between commas; others than 127.0.0.1 by ssh "
        "(default: 127.0.0.1).",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="A hostfile of mlx.launch: hosts, backend and variables.",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="How ranks communicate (default: the hostfile's, else ring).",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="A variable for every rank; may be given again.",
    )
    parser.add_argument(
        "--mpi-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="An argument of mpirun, as --mpi-arg=--oversubscribe; may be given again.",
    )
    parser.add_argument(
        "--starting-port",
        "-p",
        type=cli.positive,
        metavar="PORT",
        help="The first port of the ring, one more for each rank (default: free ports "
        f"on one host, {FIRST_PORT} on several).",
    )
    parser.add_argument(
        "--cwd", help="The working folder on every host (default: this one, if there)."
    )
    parser.add_argument(
        "--python",
        help="The Python of the other hosts, for -m MODULE, FILE.py and mlx_ep.* "
        "(default: the command as it stands).",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.finishers.append(_check)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Make the hosts of the flags; ``args.hosts`` is a `Hosts` from here on.

    Raises:
        ValueError: the flags do not go together.
    """
    if args.command[:1] == ["--"]:
        args.command = args.command[1:]
    if not args.command:
        raise ValueError("There must be a command: mlx_ep.launch -n 2 -- COMMAND ...")
    if args.command[0].startswith("-") and args.command[0] != "-m":
        raise ValueError(
            f"The command must stand behind --; got {args.command[0]}, which is no "
            "option of mlx_ep.launch."
        )
    if args.hostfile is not None and (args.hosts is not None or args.n is not None):
        raise ValueError(
            "--hostfile says on which hosts the ranks run: leave -n and --hosts out."
        )
    for entry in args.env:
        if "=" not in entry or not entry.partition("=")[0].isidentifier():
            raise ValueError(f"--env must be NAME=VALUE; got {entry!r}.")
    if args.hostfile is not None:
        args.hosts = read_hostfile(args.hostfile)
    else:
        args.hosts = list_hosts(args.hosts or "127.0.0.1", args.n or 1)
    args.backend = args.backend or args.hosts.backend or "ring"
    if args.mpi_arg and args.backend != "mpi":
        raise ValueError(f"--mpi-arg is of --backend mpi; got {args.backend}.")
    if args.backend == "mpi" and find_mpirun() is None:
        raise ValueError(
            "--backend mpi needs mpirun on the PATH (pip install 'mlx-ep[mpi]')."
        )
