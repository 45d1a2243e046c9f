"""``mlx_ep.simulate``: the command, and its commands validate and calibrate."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from mlx_ep.simulate.engine import Engine
from mlx_ep.simulate.flags import make_parser
from mlx_ep.simulate.plot import check_can_plot, plot_run
from mlx_ep.simulate.results import Totals, moments, served, totals_text, write_csv
from mlx_ep.simulate.run import open_cluster, prepare
from mlx_ep.simulate.traces import read_trace


def main() -> None:
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


def _prepare(args: argparse.Namespace) -> Engine:
    """Everything read and checked."""
    if args.plot:
        check_can_plot()
    output = _output(args)
    for file in (output, args.json, args.plot):
        if file is not None and file.is_dir():
            raise ValueError(f"{file} must be a file; it is a folder.")
    cluster = open_cluster(args)
    trace = read_trace(args.dataset).first(args.num_reqs)

    def note(text: str) -> None:
        if args.log_level == "DEBUG":
            print(f"[DEBUG] {text}")

    return prepare(args, cluster, trace, note)


def _output(args: argparse.Namespace) -> Path | None:
    if args.output is None:
        return None
    return Path(args.output.replace("{run_id}", args.run_id))


def _serve(engine: Engine, args: argparse.Namespace) -> None:
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
    if args.log_level != "WARNING":
        for moment in moments(engine, args.log_interval):
            print(moment.line())
    content = totals.content(engine)
    print(totals_text(content))
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    if args.plot is not None:
        plot_run(args.plot, engine, list(served(engine)), args.log_interval)


if __name__ == "__main__":
    main()
