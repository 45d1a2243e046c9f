"""``mlx_ep.simulate``: the command, and its commands validate and calibrate."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from mlx_ep import cli
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.flags import check_files, make_parser
from mlx_ep.simulate.plot import plot_run
from mlx_ep.simulate.results import Totals, moments, served, totals_text, write_csv
from mlx_ep.simulate.run import open_cluster, prepare
from mlx_ep.simulate.traces import read_trace

_log = logging.getLogger("mlx_ep.simulate")


def main() -> None:
    with cli.interruptible():
        _main()


def _main() -> None:
    if sys.argv[1:2] == ["validate"]:
        from mlx_ep.simulate.validate import main as validate

        return validate(sys.argv[2:])
    if sys.argv[1:2] == ["calibrate"]:
        from mlx_ep.simulate.calibrate import main as calibrate

        return calibrate(sys.argv[2:])
    parser = make_parser()
    args = parser.parse_args()
    try:
        engine = _prepare(args)
    except ValueError as error:
        parser.error(str(error))
    _serve(engine, args)


def _prepare(args: argparse.Namespace) -> Simulation:
    """Everything read and checked."""
    check_files(args, "json", "plot")
    output = _output(args)
    if output is not None:
        cli.check_output("--output", output)
    cluster = open_cluster(args)
    trace = read_trace(args.dataset).first(args.num_reqs)
    return prepare(args, cluster, trace, _log.debug)


def _output(args: argparse.Namespace) -> Path | None:
    if args.output is None:
        return None
    return Path(args.output.replace("{run_id}", args.run_id))


def _serve(engine: Simulation, args: argparse.Namespace) -> None:
    names = {instance.model.name for instance in engine.cluster.instances}
    model = names.pop()
    with tqdm(
        total=engine.num_requests,
        unit="req",
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:
        engine.run(bar.update)
    totals = Totals()
    output = _output(args)
    if output is not None:
        write_csv(output, engine, model, totals.add)
    else:
        for one in served(engine):
            totals.add(one)
    out = cli.beside(args)
    if args.log_level in ("debug", "info"):
        for moment in moments(engine, args.log_interval):
            print(moment.line(), file=out)
    content = totals.content(engine)
    print(totals_text(content), file=out)
    if args.json is not None:
        cli.write_json(args.json, content)
    if args.plot is not None:
        plot_run(args.plot, engine, list(served(engine)), args.log_interval)


if __name__ == "__main__":
    main()
