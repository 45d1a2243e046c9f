"""``mlx_ep.simulate calibrate``: step costs from a recorded run.

Of a request a client sees when it was sent, its first and its last token. Which steps
lie between follows from the scheduler, whatever they take, as long as there is a queue;
so that the costs are a linear fit, repeated until the steps stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ep import cli
from mlx_ep.simulate.cluster import Cluster, Instance, LinkLevel
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.flags import add_settings_flags, check_files, settings_of
from mlx_ep.simulate.measured import Observed, read_measured
from mlx_ep.simulate.memory import KvPool
from mlx_ep.simulate.model import ModelSizes
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.times.linear_times import LinearTimes, StepCosts
from mlx_ep.simulate.traces import Trace, TraceRequest, read_trace

# Where a fit begins; rounds after which it ends.
_START = StepCosts(step=0.02, prompt_token=1e-4, sequence=1e-4, key=0.0)
_ROUNDS = 16


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="mlx_ep.simulate calibrate",
        description="Fits what a step takes (a fixed part, per prompt token, per "
        "sequence and per key) to a recorded run of one server.",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with queued_ts, first_token_ts and last_token_ts.",
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="The trace of the same requests: token ids, for prefix caching.",
    )
    parser.add_argument(
        "--fit",
        type=cli.part,
        default=1.0,
        metavar="PART",
        help="Fit the times of the first part of the requests only, and say how well "
        "the others are predicted (default: %(default)s).",
    )
    parser.add_argument(
        "--kv-tokens",
        type=cli.positive,
        default=1 << 24,
        help="That the server's KV blocks hold (default: %(default)s).",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="Write the costs, to be the hardware of an instance in a cluster file.",
    )
    cli.add_json_flag(parser, "costs and errors")
    add_settings_flags(parser)
    args = parser.parse_args(argv)
    try:
        check_files(args, "output", "json")
        measured = read_measured(args.measured)
        trace = trace_of(measured, None if args.dataset is None else args.dataset)
        settings = settings_of(args)
        fitted = round(args.fit * len(measured))
        costs, predicted = fit(measured, trace, settings, args.kv_tokens, fitted)
    except ValueError as error:
        parser.error(str(error))
    report: dict[str, Any] = {"costs": asdict(costs)}
    text = "  ".join(f"{name} {value:.4g} s" for name, value in asdict(costs).items())
    print(text, file=cli.beside(args))
    parts = [("fitted", slice(0, fitted)), ("held out", slice(fitted, len(measured)))]
    for name, part in parts:
        if part.start == part.stop:
            continue
        report[name] = errors(measured, predicted, part)
        print(
            f"{name}: {part.stop - part.start} requests, median error: "
            + ", ".join(f"{key} {value:.1f}%" for key, value in report[name].items()),
            file=cli.beside(args),
        )
    if args.output is not None:
        costs.write(args.output)
    if args.json is not None:
        cli.write_json(args.json, report)


def trace_of(measured: Observed, dataset: Path | None) -> Trace:
    """The requests as they came.

    Raises:
        ValueError: the dataset has others.
    """
    known: list[TraceRequest | None] = [None] * len(measured)
    if dataset is not None:
        found = [r for session in read_trace(dataset).sessions for r in session]
        sizes = [(r.input_tokens, r.output_tokens) for r in found]
        wanted = list(zip(measured.inputs, measured.outputs))
        if sizes != wanted:
            raise ValueError(
                f"{dataset}: must hold the requests that were measured, in order."
            )
        known = list(found)
    sessions = []
    for index, asked in enumerate(known):
        sessions.append(
            (
                TraceRequest(
                    int(measured.inputs[index]),
                    int(measured.outputs[index]),
                    round(measured.arrival[index] * 1e9),
                    asked.input_ids if asked else None,
                    asked.output_ids if asked else None,
                    line=index + 1,
                ),
            )
        )
    return Trace(sessions)


def fit(
    measured: Observed,
    trace: Trace,
    settings: EngineSettings,
    kv_tokens: int,
    count: int,
) -> tuple[StepCosts, Observed]:
    """Costs that make the first `count` requests take what was measured.

    Returns:
        The costs, and all requests simulated with them.
    """
    costs, best = _START, (float("inf"), _START)
    for _ in range(_ROUNDS):
        engine, times = _run(trace, settings, kv_tokens, costs)
        simulated = _simulated(measured, engine)
        error = sum(errors(measured, simulated, slice(0, count)).values())
        best = min(best, (error, costs), key=lambda found: found[0])
        found = _solve(measured, engine, times, count)
        before, after = asdict(costs).values(), asdict(found).values()
        if np.allclose(list(after), list(before), rtol=1e-4):
            break
        # Half way: the steps that lie between two tokens change with the costs.
        costs = StepCosts(*((old + new) / 2 for old, new in zip(before, after)))
    engine, _ = _run(trace, settings, kv_tokens, best[1])
    return best[1], _simulated(measured, engine)


def simulated_with(
    measured: Observed,
    engine: Simulation | None,
    settings: EngineSettings | None = None,
    kv_tokens: int = 1 << 24,
    costs: StepCosts = _START,
) -> Observed:
    """The requests of a recording as an engine serves them.

    Args:
        engine: that has not run; None: one with these settings, blocks and costs.
    """
    if engine is None:
        trace = trace_of(measured, None)
        engine, _ = _run(trace, settings or EngineSettings(), kv_tokens, costs)
    else:
        engine.run()
    return _simulated(measured, engine)


def _simulated(measured: Observed, engine: Simulation) -> Observed:
    requests = sorted(engine.requests, key=lambda request: request.index)
    ends = [engine.times_of(request) for request in requests]
    return Observed(
        measured.inputs,
        measured.outputs,
        np.array([r.arrival for r in requests]) / 1e9,  # on host
        np.array([times[0] for times in ends]) / 1e9,  # on host
        np.array([times[-1] for times in ends]) / 1e9,  # on host
    )


def _solve(
    measured: Observed, engine: Simulation, times: LinearTimes, count: int
) -> StepCosts:
    """The fit for the steps of one simulation; every equation counts by its share."""
    log = engine.groups[0].log
    ends = log.ends / 1e9
    features = times.features(log.count)
    sums = np.concatenate([np.zeros((1, 4)), np.cumsum(features, axis=0)])
    begins = ends - features @ list(asdict(times.costs).values())
    rows, values = [], []
    for request in engine.requests:
        if request.index >= count:
            continue
        first = request.emitted[0]
        last = request.emitted[-2] + request.emitted[-1] - 1
        # From the step during which it came on, less what had passed of it.
        came = int(np.searchsorted(ends, request.arrival / 1e9, side="right"))
        passed = max(request.arrival / 1e9 - float(begins[came]), 0.0)
        ttft = measured.first[request.index] - measured.arrival[request.index]
        rows.append(sums[first + 1] - sums[came])
        values.append(ttft + passed)
        if last > first:
            rows.append(sums[last + 1] - sums[first + 1])
            values.append(
                float(measured.last[request.index] - measured.first[request.index])
            )
    scale = np.maximum(np.array(values, np.float64), 1e-6)  # on host
    matrix = np.array(rows) / scale[:, None]  # on host
    return StepCosts(*_least_squares(matrix, np.ones(len(scale))))


def _least_squares(matrix: np.ndarray, values: np.ndarray) -> list[float]:
    """The fit with no number below 0: what would be is left out."""
    used = list(range(matrix.shape[1]))
    found = np.zeros(matrix.shape[1])
    while used:
        solved, *_ = np.linalg.lstsq(matrix[:, used], values)
        if (solved >= 0).all():
            found[used] = solved
            break
        del used[int(np.argmin(solved * np.abs(matrix[:, used]).mean(axis=0)))]
    return [float(value) for value in found]


def _run(
    trace: Trace, settings: EngineSettings, kv_tokens: int, costs: StepCosts
) -> tuple[Simulation, LinearTimes]:
    blocks = max(kv_tokens // settings.block_size, 1)
    link = LinkLevel(1.0, 0.0)
    instance = Instance(
        where="the measured server",
        index=0,
        node=0,
        model=_UNKNOWN,
        hardware="measured",
        memory=0.0,
        pd_type=None,
        tp=1,
        pp=1,
        ep=1,
        dp_group=None,
        settings=settings,
        pool=KvPool(blocks, settings.block_size, 0.0, 0.0, 0, 1.0),
    )
    cluster = Cluster(
        file="--measured",
        instances=[instance],
        groups=[(instance,)],
        devices=link,
        instances_link=link,
        nodes_link=link,
    )
    times = LinearTimes(costs)
    engine = Simulation(cluster, trace, [times])
    engine.run()
    return engine, times


_UNKNOWN = ModelSizes(
    name="measured",
    num_layers=1,
    num_moe_layers=0,
    width=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    dense_width=1,
    num_experts=0,
    top_k=0,
    expert_width=0,
    shared_width=0,
    vocabulary=1,
    is_tied=False,
    packed_bytes=0.0,
    config={},
)


def errors(measured: Observed, predicted: Observed, part: slice) -> dict[str, float]:
    """Median of the requests' relative errors, percent: E2E, TTFT, ITL."""
    found = {}
    for name, key in (("E2E", "latency"), ("TTFT", "TTFT"), ("ITL", "TPOT")):
        truth, ours = measured.metrics[key][part], predicted.metrics[key][part]
        known = truth > 0
        relative = np.abs(ours[known] / truth[known] - 1)
        found[name] = 100 * float(np.median(relative)) if known.any() else 0.0
    return found
