"""How far is a simulated batch from the same batch run here?

The embedded model answers batches of prompts on one rank, as ``mlx_ep.generate
--prompts-file`` does (mlx-lm's BatchGenerator), and the times of all tokens are noted.
Two predictions of their throughput and time per token stand beside them:

- by the cost model, from a profile that `mlx_ep.calibrate`'s functions measure in this
  process before, with experts of the model's width (or that of ``--profile``);
- by step costs that `mlx_ep.simulate calibrate` fits to some batches, for others of
  other sizes and lengths.

A calibration times all it measures in rounds, and all batches run after each of them: a
machine that is slow for seconds (the one of the results is, by up to 2.3 times, for up
to 8 s) is so for some rounds of either. Of the rounds the fast tenth counts, of a
calibration's times as of a batch's first token and of the rest of its tokens. All of
that is repeated, and the median of the repetitions counts.

Everything runs on one core, and seconds, of the batches and of the calibration, are
those that the core spent on this process: as many as the clock on the wall shows where
nothing else runs there, and the same where other programs take turns. The scheduler is
told that this is a batch job (SCHED_BATCH on Linux). Otherwise the thread that computes
interrupts the one that hands it work, hundreds of times a step, and how often changes
what a step takes. Target: 10 % for throughput and time per token.

    python -m benchmarks.bench_simulate_batches --check
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import BatchGenerator

from benchmarks.harness import Target, arguments, finish, heading, own_cores, pin
from mlx_ep.calibrate import FAST, ROUNDS, calibrate
from mlx_ep.comm import init
from mlx_ep.cost.profile import write_profile
from mlx_ep.loading import find_model
from mlx_ep.loading.checkpoint import read_config
from mlx_ep.metrics import markdown_table
from mlx_ep.simulate.calibrate import fit, simulated_with, trace_of
from mlx_ep.simulate.flags import make_parser
from mlx_ep.simulate.measured import Observed
from mlx_ep.simulate.run import open_cluster, prepare
from mlx_ep.simulate.settings import EngineSettings

# Prompts, tokens of each, tokens of each answer.
FITTED = ((4, 64, 80), (10, 96, 64), (16, 64, 64), (8, 256, 48))
PREDICTED = ((6, 128, 96), (12, 48, 72), (3, 200, 64), (16, 80, 48))
REPEATS = 3
POOL = 1 << 24
GAP = 1e3  # s between batches of one recording, so that they do not meet
LIMIT = 10.0


def hand_over_in_batches() -> None:
    """No thread of this process interrupts another one that it was woken by."""
    if hasattr(os, "SCHED_BATCH"):
        for thread in os.listdir("/proc/self/task"):  # MLX has started threads already
            os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))


def run_batch(model: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """``[steps]`` s of this core for each token of all, the first with the prompts."""
    count, length, outputs = shape
    chosen = random.Random(length)
    prompts = [
        [chosen.randrange(20, 1000) for _ in range(length)] for _ in range(count)
    ]
    generator = BatchGenerator(model, max_tokens=outputs, prefill_batch_size=count)
    mx.synchronize()  # the batch before has begun a step behind its last token
    times = [time.process_time()]
    generator.insert(prompts, [outputs] * count)
    for _ in range(outputs):  # all prompts are as long: each step is one of all
        responses: Sequence[Any] = ()
        while not responses:
            _, responses = generator.next()
        assert len(responses) == count
        times.append(time.process_time())
    generator.close()
    return np.diff(times)


def fast(rounds: Sequence[np.ndarray], count: int) -> np.ndarray:
    """``[prompts, 2]`` s to the first and the last token, from the steps of rounds: the
    fast tenth of the first step and of all others together.
    """
    first = float(np.quantile([steps[0] for steps in rounds], FAST))
    rest = float(np.quantile([steps[1:].sum() for steps in rounds], FAST))
    return np.tile([first, first + rest], (count, 1))


def recording(
    shapes: Sequence[tuple[int, int, int]], times: Sequence[np.ndarray]
) -> Observed:
    """Batches one after another, as if one server had been asked for them."""
    parts: list[list[Any]] = [[], [], [], [], []]
    for index, ((count, length, outputs), found) in enumerate(zip(shapes, times)):
        start = index * GAP
        columns = (
            [length] * count,
            [outputs] * count,
            [start] * count,
            start + found[:, 0],
            start + found[:, 1],
        )
        for part, column in zip(parts, columns):
            part.extend(column)
    return Observed(*(np.array(part) for part in parts))


def settings_of(shapes: Sequence[tuple[int, int, int]]) -> EngineSettings:
    """mlx-lm's way: a batch of prompts whole, and no captured graphs."""
    return EngineSettings(
        max_num_seqs=max(count for count, _, _ in shapes),
        max_num_batched_tokens=0,
        enable_prefix_caching=False,
        async_scheduling=False,
        graphs=False,
    )


def figures(batch: Observed) -> tuple[float, float]:
    """Tokens per second, and ms per token behind the first."""
    start = batch.arrival.min()
    rate = batch.outputs.sum() / (batch.last.max() - start)
    return float(rate), float(batch.metrics["TPOT"].mean() * 1e3)


def by_profile(
    profile: Path, config: dict[str, Any], measured: Observed, shape: tuple[int, ...]
) -> Observed:
    """One batch by the cost model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models").mkdir()
        (folder / "models" / "embedded.json").write_text(json.dumps(config))
        instance = {
            "model_name": "embedded",
            "hardware": str(profile.resolve()),
            "npu_mem": {"mem_size": 64, "mem_bw": 1, "mem_latency": 0},
            "pd_type": None,
            "max_num_batched_tokens": 0,
        }
        node = {
            "num_instances": 1,
            "cpu_mem": {"mem_size": 1, "mem_bw": 1, "mem_latency": 0},
            "instances": [instance],
        }
        cluster = {"num_nodes": 1, "link_bw": 1, "link_latency": 0, "nodes": [node]}
        (folder / "c.json").write_text(json.dumps(cluster))
        line = {"input_toks": shape[1], "output_toks": shape[2], "arrival_time_ns": 0}
        trace = folder / "t.jsonl"
        trace.write_text((json.dumps(line) + "\n") * shape[0])
        argv = ["--cluster-config", str(folder / "c.json"), "--dataset", str(trace)]
        argv += ["--dtype", "float32", "--no-async-scheduling"]
        args = make_parser().parse_args(argv)
        engine = prepare(args, open_cluster(args), trace_of(measured, None))
    return simulated_with(measured, engine)


def own_profile(between: Callable[[], None], quick: bool) -> Path:
    """A profile that is measured now, in turn with what is `between` its rounds."""
    file = Path(tempfile.mkdtemp()) / "profile.json"
    profile = calibrate(init(), ["plain"], (128, 64), quick, time.process_time, between)
    write_profile(profile, file)
    return file


def in_turn_with_profile(
    model: Any,
    shapes: Sequence[tuple[int, int, int]],
    samples: int,
    given: Path | None,
    quick: bool,
) -> tuple[Path, list[np.ndarray]]:
    """A profile, the `given` one or measured, and `fast` of each shape."""
    found: list[list[np.ndarray]] = [[] for _ in shapes]

    def run_all() -> None:
        for mine, shape in zip(found, shapes):
            runs = [run_batch(model, shape) for _ in range(samples)]
            mine.append(np.mean(runs, axis=0))

    if given is None:
        profile = own_profile(run_all, quick)
    else:
        profile = given
        for _ in range(ROUNDS):
            run_all()
    return profile, [fast(steps, shape[0]) for steps, shape in zip(found, shapes)]


def predictions(
    profile: Path,
    config: dict[str, Any],
    shapes: Sequence[tuple[int, int, int]],
    times: Sequence[np.ndarray],
) -> dict[tuple[Any, str], tuple[float, ...]]:
    """By predicted shape and way, what was measured and what it was simulated as."""
    fitted = recording(FITTED, times[: len(FITTED)])
    settings = settings_of(shapes)
    costs, _ = fit(fitted, trace_of(fitted, None), settings, POOL, len(fitted))
    found: dict[tuple[Any, str], tuple[float, ...]] = {}
    for shape, own in zip(PREDICTED, times[len(FITTED) :]):
        measured = recording([shape], [own])
        ways = {
            "profile": by_profile(profile, config, measured, shape),
            "fit": simulated_with(measured, None, settings, POOL, costs),
        }
        for way, predicted in ways.items():
            found[shape, way] = (*figures(measured), *figures(predicted))
    return found


def errors_of(both: Sequence[float]) -> tuple[float, float]:
    """Of throughput and time per token, in percent."""
    rate, tpot, our_rate, our_tpot = both
    return 100 * (our_rate / rate - 1), 100 * (our_tpot / tpot - 1)


def spread_of(errors: np.ndarray) -> str:
    """The median of the repetitions, and from where to where they are."""
    text = f"{np.median(errors):+.1f} %"
    if len(errors) > 1:
        text += f" ({errors.min():+.1f} to {errors.max():+.1f})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__ or "", samples=1)
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="Instead of measuring one."
    )
    args = parser.parse_args(argv)
    print(heading("Simulated batches beside the same batches run here, on one core"))
    pin(own_cores())
    hand_over_in_batches()
    path = find_model("jargon-moe", None, download="ranges")
    model, _ = mlx_lm.load(str(path))
    shapes = [*FITTED, *PREDICTED]
    repeats, samples = (1, 2) if args.quick else (REPEATS, args.samples)
    for shape in shapes:  # warm-up
        run_batch(model, shape)
    config = read_config(path)
    found: dict[tuple[Any, str], list[tuple[float, ...]]] = {}
    for _ in range(repeats):
        profile, times = in_turn_with_profile(
            model, shapes, samples, args.profile, args.quick
        )
        predicted = predictions(profile, config, shapes, times)
        for key, both in predicted.items():
            found.setdefault(key, []).append(both)
    rows, records, targets = [], [], []
    for (shape, way), of_repeats in found.items():
        rate, tpot, our_rate, our_tpot = np.median(of_repeats, axis=0)
        errors = np.array([errors_of(both) for both in of_repeats])
        wrong = np.median(errors, axis=0)
        rows.append(
            [
                f"{shape[0]} prompts of {shape[1]}, {shape[2]} tokens, {way}",
                f"{rate:.1f}",
                f"{our_rate:.1f}",
                spread_of(errors[:, 0]),
                f"{tpot:.2f}",
                f"{our_tpot:.2f}",
                spread_of(errors[:, 1]),
            ]
        )
        records.append(
            {"shape": shape, "way": way, "errors_percent": errors.tolist()}  # on host
        )
        for name, error in zip(("throughput", "time per token"), wrong):
            title = f"{shape[0]} prompts, {way}, {name}, %"
            targets.append(Target(title, abs(float(error)), LIMIT))
    columns = ["batch", "tok/s", "simulated", "", "ms/token", "simulated", ""]
    print(markdown_table(columns, rows))
    worst = max(targets, key=lambda target: target.value)
    mx.clear_cache()
    return finish(
        args, records, targets, f"at most {worst.value:.1f} % off: {worst.name}"
    )


if __name__ == "__main__":
    sys.exit(main())
