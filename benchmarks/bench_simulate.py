"""How long does a simulation take, and how far is it from a measured server?

Speed needs nothing but this repository: two instances that share experts serve
generated requests. The same requests are served by a simulator written plainly, one
token at a time (`tests/support/simulate/plain.py`), in turn with ours: the CSV must be
the same bytes. With ``--reference DIR`` a measured run is simulated as well; DIR is
laid out as
LLMServingSim's files are: ``perf/``, ``models/``, ``traces/``, and in
``reference/<name>/`` a cluster file ``config.json`` and ``requests.jsonl``, when each
request was queued and had its first and last token.

    python -m benchmarks.bench_simulate --check
    python -m benchmarks.bench_simulate --reference DIR --run qwen3-32b --trace FILE

Targets: 300 requests with 200,000 output tokens under 5 s and 10,000 requests under
60 s, one core; the same bytes as the plain one. Against the measured run: mean TTFT,
TPOT and latency within 1.5 %, nothing fitted; `mlx_ep.simulate calibrate`, fitted to
the first half, predicts the second: median error of E2E at most 6.7 %, of TTFT 17.6 %,
of ITL 7.1 %.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Samples, Target, arguments, finish, heading, ratio
from mlx_ep.metrics import markdown_table
from mlx_ep.simulate.calibrate import errors, fit, trace_of
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.flags import make_parser
from mlx_ep.simulate.measured import read_measured, read_simulated
from mlx_ep.simulate.results import write_csv
from mlx_ep.simulate.run import open_cluster, prepare
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.traces import read_trace
from mlx_ep.simulate.validate import compare
from tests.support.simulate.data import (
    make_folder,
    trace_lines,
    two_members,
    write_trace,
)
from tests.support.simulate.plain import plain_csv

FEW, MANY, QUICK = 300, 10_000, 40
OUTPUTS = (300, 1030)  # about 665 tokens a request, as in the measured run
LIMITS = {"E2E": 6.7, "TTFT": 17.6, "ITL": 7.1}
BIG_POOL = {"mem_size": 4.0, "mem_bw": 100, "mem_latency": 0}


def open_engine(cluster: Path, trace: Path, *flags: str) -> Simulation:
    """Everything read, nothing served."""
    argv = ["--cluster-config", str(cluster), "--dataset", str(trace), *flags]
    args = make_parser().parse_args(argv)
    return prepare(args, open_cluster(args), read_trace(trace))


def serve(cluster: Path, trace: Path, out: Path, *flags: str) -> Simulation:
    """What the command does: read, serve, write the CSV."""
    engine = open_engine(cluster, trace, *flags)
    engine.run()
    write_csv(out, engine, engine.cluster.instances[0].model.name)
    return engine


def cpu_seconds() -> float:
    """Of this process, so that a busy machine counts less."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def speed(
    folder: Path, count: int, samples: int
) -> tuple[list[dict[str, Any]], list[Target], str]:
    """Ours and the plain simulator in turn, the same bytes; then many requests."""
    make_folder(folder, c=two_members(npu_mem=BIG_POOL))
    cluster, trace = folder / "c.json", folder / "few.jsonl"
    options = {"inputs": (50, 1700), "outputs": OUTPUTS}
    lines = trace_lines(count, gap_ns=1e8, **options)
    write_trace(trace, lines)
    ours, plain, is_same = [], [], True
    for _ in range(samples):
        started = time.perf_counter()
        serve(cluster, trace, folder / "ours.csv")
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        engine = open_engine(cluster, trace)
        times = [group._times for group in engine.groups]
        text = plain_csv(engine.cluster, read_trace(trace), times)
        plain.append(time.perf_counter() - started)
        is_same &= text == (folder / "ours.csv").read_text()
    tokens = sum(line["output_toks"] for line in lines)
    many = MANY if count == FEW else 10 * count
    big = folder / "many.jsonl"
    write_trace(big, trace_lines(many, gap_ns=1e8, **options))
    started, used = time.perf_counter(), cpu_seconds()
    serve(cluster, big, folder / "many.csv")
    wall, cpu = time.perf_counter() - started, cpu_seconds() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ours_samples, plain_samples = Samples(tuple(ours)), Samples(tuple(plain))
    faster = ratio(plain_samples, ours_samples)
    print(
        markdown_table(
            ["", "requests", "s", "CPU s"],
            [
                ["ours", count, ours_samples.text("s"), ""],
                ["plain", count, plain_samples.text("s"), ""],
                ["ours", many, f"{wall:.1f}", f"{cpu:.1f}"],
            ],
        )
    )
    print(
        f"\n{count} requests have {tokens} output tokens. The same bytes: {is_same}. "
        f"The most memory this process held: {peak:.0f} MiB.\n"
    )
    record = {
        "requests": count,
        "tokens": tokens,
        "ours_seconds": ours,
        "plain_seconds": plain,
        "same_bytes": is_same,
        "many_requests": many,
        "many_seconds": wall,
        "many_cpu_seconds": cpu,
        "peak_mib": peak,
    }
    targets = [
        Target(f"{count} requests, s", ours_samples.median, 5.0),
        Target(f"{many} requests, s", wall, 60.0),
        Target("the same bytes as the plain simulator", float(is_same), 1.0, True),
    ]
    figure = (
        f"{count} requests in {ours_samples.median:.2f} s, {faster.median:.1f} times "
        f"as fast as plainly; {many} in {wall:.1f} s"
    )
    return [record], targets, figure


def accuracy(
    folder: Path, reference: Path, run: str, trace: Path
) -> tuple[list[dict[str, Any]], list[Target], str]:
    """The measured run beside its simulation, and the fit of its first half."""
    own = reference / "reference" / run
    measured = read_measured(own / "requests.jsonl")
    flags = ["--model-dir", str(reference / "models")]
    flags += ["--profile-dir", str(reference / "perf")]
    out = folder / "reference.csv"
    started = time.perf_counter()
    serve(own / "config.json", trace, out, *flags)
    took = time.perf_counter() - started
    rows = compare(measured, read_simulated(out))
    print(
        markdown_table(
            ["", "measured ms", "simulated ms", "difference"],
            [
                [
                    f"{row['metric']} {row['statistic']}",
                    f"{row['measured_ms']:.1f}",
                    f"{row['simulated_ms']:.1f}",
                    f"{row['difference_percent']:+.1f} %",
                ]
                for row in rows
            ],
        )
    )
    means = {r["metric"]: r for r in rows if r["statistic"] == "mean"}
    targets = [
        Target(f"mean {metric}, %", abs(row["difference_percent"]), 1.5)
        for metric, row in means.items()
    ]
    half = len(measured) // 2
    records: list[dict[str, Any]] = [{"run": run, "seconds": took, "rows": rows}]
    for dataset in (None, trace):
        known = trace_of(measured, dataset)
        costs, predicted = fit(measured, known, EngineSettings(), 1 << 24, half)
        found = errors(measured, predicted, slice(half, len(measured)))
        name = "with token ids" if dataset else "from the recording alone"
        print(f"\nfit of the first half {name}, {costs}: the second half: {found}")
        records.append({"fit": name, "costs": vars(costs), "median_errors": found})
        targets += [
            Target(f"fit {name}, median {key}, %", found[key], limit)
            for key, limit in LIMITS.items()
        ]
    text = ", ".join(
        f"{metric} {row['difference_percent']:+.1f} %" for metric, row in means.items()
    )
    return records, targets, f"{run}: {text} in {took:.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__ or "", samples=3)
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a measured run")
    parser.add_argument("--run", default="qwen3-32b", help="its name (%(default)s)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="what it was asked")
    args = parser.parse_args(argv)
    if (args.reference is None) != (args.trace is None):
        parser.error("--reference and --trace go together.")
    print(heading("Simulation: speed, and distance from a measured server"))
    count = QUICK if args.quick else FEW
    samples = 1 if args.quick else args.samples
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records, targets, figure = speed(folder, count, samples)
        if args.reference is not None:
            more = accuracy(folder, args.reference, args.run, args.trace)
            records, targets = records + more[0], targets + more[1]
            figure += f"; {more[2]}"
    return finish(
        args, json.loads(json.dumps(records, default=_plain)), targets, figure
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers as JSON has them."""
    return value.item() if isinstance(value, np.generic) else str(value)


if __name__ == "__main__":
    sys.exit(main())
