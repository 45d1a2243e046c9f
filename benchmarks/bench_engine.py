"""What does the server's engine cost while nobody asks, and how soon does it start?

2 ranks over MPI and over the ring, without HTTP, on the embedded model: seconds of CPU
that each rank uses in a second without a request, the time from `submit` until all
ranks have begun the step that takes the request, and tokens per second of the engine
with 1 to 32 requests at once, beside mlx-lm's BatchGenerator in one process, whose
answers must be the same.

    python -m benchmarks.bench_engine --check
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import batch_generate

import mlx_ep
from benchmarks.harness import Samples, Target, arguments, finish, heading, run_pinned
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.loading import find_model
from mlx_ep.server.build import build_engine
from mlx_ep.server.engine import ServingEngine
from mlx_ep.server.pools import EngineOptions
from mlx_ep.server.requests import Request, Sampling, Token

MOST_IDLE_SHARE = 0.05  # of a core
MOST_START_SECONDS = 0.01
TOKENS = 32
PROMPTS = [(0, 2, 300 + term, 3) for term in range(7)]  # questions it knows
# The model's end token is not drawn, so that all answers are equally long.
ENDLESS = Sampling(logit_bias={1: -100.0, 3: -100.0, 0: -100.0, 2: -100.0})


def measure(
    group: mx.distributed.Group,
    config: dict[str, Any],
    samples: int,
    idle_seconds: float,
    at_once: tuple[int, ...],
) -> dict[str, Any]:
    """On one rank: share of a core when idle, starts in s, tokens/s by requests."""
    model, tokenizer = mlx_ep.load(
        str(find_model("jargon-moe")), group, EPConfig(**config)
    )
    options = EngineOptions(max_kv_memory=10**8, prefix_cache_memory=0)
    engine = build_engine(model, tokenizer, GroupComm(group), options)
    found: dict[str, Any] = {"starts": [], "throughput": {}, "answers": {}}

    def watch_idle() -> None:
        time.sleep(1.0)
        before = time.process_time()
        time.sleep(idle_seconds)
        found["idle"] = (time.process_time() - before) / idle_seconds

    def client() -> None:
        _ask(engine, 4, {})  # what is compiled at first
        watch_idle()
        for _ in range(samples):
            time.sleep(0.05)
            found["starts"].append(_start_seconds(engine))
        for count in at_once:
            seconds = _ask(engine, count, found["answers"].setdefault(count, {}))
            found["throughput"][count] = count * TOKENS / seconds
        engine.stop()

    target = client if group.rank() == 0 else watch_idle
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    engine.run()
    thread.join()
    return found


def _ask(engine: ServingEngine, count: int, answers: dict[int, list[int]]) -> float:
    """Seconds for `count` requests at once; puts their tokens into `answers`."""
    done = threading.Semaphore(0)

    def deliver(event: Token) -> None:
        if event.token is not None:
            answers.setdefault(int(event.request.split()[0]), []).append(event.token)
        if event.finish_reason is not None:
            done.release()

    start = time.perf_counter()
    for number in range(count):
        prompt = PROMPTS[number % len(PROMPTS)]
        engine.submit(Request(f"{number} {start}", prompt, TOKENS, ENDLESS), deliver)
    for _ in range(count):
        done.acquire()
    return time.perf_counter() - start


def _start_seconds(engine: ServingEngine) -> float:
    """From `submit` until all ranks have told rank 0 that they are in the step."""
    worker, hear = engine._worker, engine._worker.hear
    times = []

    def note(*arguments: Any) -> Any:
        times.append(time.perf_counter())
        return hear(*arguments)

    worker.hear = note  # type: ignore[method-assign, assignment]
    done = threading.Event()
    start = time.perf_counter()
    request = Request(f"start {start}", PROMPTS[0], 1, ENDLESS)
    engine.submit(request, lambda event: done.set())
    done.wait()
    worker.hear = hear  # type: ignore[method-assign]
    return times[0] - start


def batch_throughput(count: int) -> tuple[float, list[list[int]]]:
    """Tokens/s of mlx-lm's BatchGenerator in this process, and the answers."""
    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    bias = ENDLESS.logit_bias
    prompts = [list(PROMPTS[number % len(PROMPTS)]) for number in range(count)]

    def endless(_: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, mx.array(list(bias))].add(mx.array(list(bias.values())))

    def run() -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        answers = batch_generate(
            model, tokenizer, prompts, max_tokens=TOKENS, return_token_ids=True,
            logits_processors=[endless], completion_batch_size=32,
        ).token_ids  # fmt: skip
        return count * TOKENS / (time.perf_counter() - start), answers

    run()
    return run()


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=20).parse_args()
    print(heading("The server's engine, without HTTP"))
    samples, idle = (3, 1.0) if args.quick else (args.samples, 5.0)
    at_once = (1, 8) if args.quick else (1, 2, 4, 8, 16, 32)
    records: list[dict[str, Any]] = []
    served: list[dict[int, dict[int, list[int]]]] = []
    runs = [("mpi", {}), ("ring", {}), ("mpi", {"strategy": "auto"})]
    for transport, config in runs[: 2 if args.quick else 3]:
        ranks = run_pinned(
            2, measure, config, samples, idle, at_once, transport=transport
        )
        starts = Samples(tuple(ranks[0]["starts"]))
        attention = "data" if config else "replicated"
        record = {
            "transport": transport,
            "attention": attention,
            "idle_cores": [rank["idle"] for rank in ranks],
            "start_seconds": list(starts.seconds),
            "tokens_per_second": ranks[0]["throughput"],
        }
        records.append(record)
        served.append(ranks[0]["answers"])
        idles = ", ".join(f"{rank['idle']:.4f}" for rank in ranks)
        rates = ", ".join(f"{n}: {v:.0f}" for n, v in ranks[0]["throughput"].items())
        print(
            f"2 ranks, {transport}, attention {attention}: idle {idles} of a core; "
            f"start {starts.text('ms')}; tokens/s by requests at once {rates}",
            flush=True,
        )
    alone = {count: batch_throughput(count) for count in at_once}
    differing = sum(
        answers[count].get(number) != expected
        for answers in served
        for count, (_, all_expected) in alone.items()
        for number, expected in enumerate(all_expected)
    )
    speeds = {count: speed for count, (speed, _) in alone.items()}
    records.append({"mlx_lm": "BatchGenerator", "tokens_per_second": speeds})
    rates = ", ".join(f"{n}: {v:.0f}" for n, v in speeds.items())
    print(f"mlx-lm's BatchGenerator, one process: {rates}")
    engines = records[:-1]
    worst = max(max(record["idle_cores"]) for record in engines)
    slowest = max(Samples(tuple(r["start_seconds"])).median for r in engines)
    targets = [
        Target("answers that are not mlx-lm's", differing, 0),
        Target("cores that an idle rank uses", worst, MOST_IDLE_SHARE),
        Target("seconds until a request starts, median", slowest, MOST_START_SECONDS),
    ]
    return finish(args, records, targets, f"start of a request: {slowest * 1e3:.2f} ms")


if __name__ == "__main__":
    sys.exit(main())
