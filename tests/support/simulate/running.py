"""Runs of mlx_ep.simulate in this process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from mlx_ep.simulate import __main__ as command
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.flags import make_parser
from mlx_ep.simulate.results import write_csv
from mlx_ep.simulate.run import open_cluster, prepare
from mlx_ep.simulate.traces import read_trace


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def run_command(
    argv: Sequence[str | Path], stream: type[io.StringIO] = io.StringIO
) -> Outcome:
    """The command with these arguments: exit code and what it printed.

    Args:
        stream: what its standard error is.
    """
    out, err, code = io.StringIO(), stream(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr("sys.argv", ["mlx_ep.simulate", *map(str, argv)])
        try:
            command.main()
        except SystemExit as error:
            code = int(error.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def make_engine(cluster: Path, trace: Path, *flags: str) -> Simulation:
    """The engine of a command line, not run yet."""
    argv = ["--cluster-config", str(cluster), "--dataset", str(trace), *flags]
    args = make_parser().parse_args(argv)
    opened = open_cluster(args)
    return prepare(args, opened, read_trace(args.dataset).first(args.num_reqs))


def csv_of(engine: Simulation, file: Path) -> str:
    engine.run()
    write_csv(file, engine, engine.cluster.instances[0].model.name)
    return file.read_text()
