"""How many tokens per second does the server give, beside mlx_lm.server?

Three servers on this host under the same load: `mlx_ep.server` on 2 MPI ranks, each of
which runs the attention of its own requests (`--attention`), mlx_lm.server under the
overlay on 2 MPI ranks, mlx_lm.server on one rank. 1 to 32 requests are open at once,
with prompts of about 64 tokens and 48 greedy tokens. The servers take turns in
`--samples` rounds (3), in another order in each; medians count. In the first round a
short request comes while a prompt of 8000 tokens is processed. The model is the
embedded one with a longer context. `--model large` takes random 4-bit weights of 380 MB
(qwen3_moe, 64 experts) with prompts of 16 and answers of 12 tokens, one round, and no
long prompt: of those mlx_lm.server processes 10 tokens a second on one core. Everything
stays on 127.0.0.1.

    python -m benchmarks.bench_serve --check
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.harness import Target, arguments, finish, heading
from mlx_ep.benchmark import load
from mlx_ep.benchmark.serve import summary
from mlx_ep.cli import at_least
from mlx_ep.loading import find_model
from mlx_ep.metrics import markdown_table
from mlx_ep.overlay.make import make_overlay
from tests.support.launchers import mpirun_command, rank_environment
from tests.support.tiny import save_checkpoint

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
# Of a prompt and its answer, as of the words that are tried first; of the large model
# mlx_lm.server takes 0.1 s for each on one rank, in prompts too.
INPUT_TOKENS, OUTPUT_TOKENS = 64, 48
LARGE_INPUT_TOKENS, LARGE_OUTPUT_TOKENS, LARGE_WORDS = 16, 12, 8
CONTEXT = 16384
LONG_TOKENS = {False: 8000, True: 2000}  # --quick; none with --model large
ANSWER_LIMIT = 300.0  # s; beside a long prompt mlx_lm.server takes minutes
OURS, OVERLAY, ALONE = "mlx_ep.server, 2 ranks", "overlay, 2 ranks", "mlx_lm, 1 rank"
CONFIG = Path(__file__).parent / "configs" / "qwen3-moe-400mb" / "config.json"
# The end token is never drawn: every answer has all its tokens.
BODY: dict[str, Any] = {"temperature": 0, "logit_bias": {"1": -1000}}
START_LIMIT = 60.0  # s


def make_models(folder: Path, name: str) -> tuple[Path, Path]:
    """The model with a long context, and its overlay."""
    model = folder / "model"
    if name == "embedded":
        shutil.copytree(find_model("jargon-moe"), model)
        config = json.loads((model / "config.json").read_text())
    else:
        config = json.loads(CONFIG.read_text())
        quantization = config.pop("quantization")
        save_checkpoint(model, config, quantization=quantization)
        config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (model / "config.json").write_text(json.dumps(config))
    return model, make_overlay(str(model), folder / "model-ep")


def command_of(arm: str, model: Path, overlay: Path, attention: str) -> list[str]:
    if arm == OURS:
        return ["mlx_ep.server", "--model", str(model), "--attention", attention]
    source = overlay if arm == OVERLAY else model
    return ["mlx_lm", "server", "--model", str(source), "--trust-remote-code"]


@contextlib.contextmanager
def serving(arm: str, command: list[str], log: Path) -> Iterator[str]:
    """A server that answers, and the address of its API.

    Raises:
        RuntimeError: it does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher, variables = ([], {}) if arm == ALONE else mpirun_command(2)
    argv = [*launcher, sys.executable, "-m", *command]
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*argv, "--port", str(port)],
            env=rank_environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            _wait(process, address, log)
            yield f"{address}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{address} does not answer:\n{log.read_text()[-2000:]}")


async def measure(
    address: str,
    concurrencies: list[int],
    long_tokens: int,
    number: int,
    is_large: bool,
) -> tuple[list[dict[str, Any]], float | None]:
    """A summary for each concurrency; in round 0 TTFT beside a long prompt, s."""
    target = load.Target(address, "default_model", body=BODY, seconds=ANSWER_LIMIT)
    async with target:
        if is_large:
            await target.measure_words(LARGE_WORDS)
            short = load.Ask(LARGE_INPUT_TOKENS, LARGE_OUTPUT_TOKENS)
        else:
            await target.measure_words()
            short = load.Ask(INPUT_TOKENS, OUTPUT_TOKENS)
            await load.run_load(target, [short] * 4, 4, seed=-1)
        found = []
        for count in concurrencies:
            replies = await load.run_load(
                target, [short] * requests_of(count, is_large), count, seed=count
            )
            found.append(summary(replies, count))
            rate = found[-1]["output_tokens_per_second"]
            print(f"{count} at once: {rate:.0f} tokens/s", file=sys.stderr, flush=True)
        if number or not long_tokens:
            return found, None
        return found, await first_beside(target, long_tokens)


def requests_of(count: int, is_large: bool) -> int:
    """Requests in all, where `count` are open at once."""
    return max(count, 2) if is_large else max(2 * count, 6)


async def first_beside(target: load.Target, long_tokens: int) -> float:
    """TTFT of a short request that comes while a long prompt is processed, s.

    Raises:
        RuntimeError: one of them was not answered, or the long one was done first.
    """
    long = asyncio.ensure_future(
        target.ask(0, load.Ask(long_tokens, 2), random.Random("long"))
    )
    await asyncio.sleep(0.2)
    if long.done():
        raise RuntimeError(f"the long prompt was done too soon: {long.result()}")
    short = await target.ask(1, load.Ask(INPUT_TOKENS, 4), random.Random("short"))
    # What is still to be done of it would take most of a minute here.
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    if short.error:
        raise RuntimeError(f"no answer beside a long prompt: {short.error}")
    return short.ttft


def main() -> int:
    assert __doc__ is not None
    parser = arguments(__doc__, samples=3)
    parser.set_defaults(samples=None)
    parser.add_argument("--model", choices=("embedded", "large"), default="embedded")
    parser.add_argument(
        "--attention", choices=("data", "replicated", "tensor", "auto"), default="data"
    )
    parser.add_argument(
        "--long-tokens",
        type=at_least(0),
        help="Of the long prompt; 0: none, for a run of some minutes less.",
    )
    parser.add_argument(
        "--at-once",
        type=lambda text: [at_least(1)(part) for part in text.split(",")],
        default=list(CONCURRENCIES),
        help="Requests that are open at once, such as 1,8.",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the servers
    is_large = args.model == "large"
    concurrencies = [1, 8] if args.quick else args.at_once
    rounds = 1 if args.quick else args.samples or (1 if is_large else 3)
    long_tokens = args.long_tokens
    if long_tokens is None:
        long_tokens = 0 if is_large else LONG_TOKENS[args.quick]
    print(
        heading(
            f"Serving the {args.model} model, beside mlx_lm.server; "
            f"attention {args.attention}"
        ),
        flush=True,
    )
    arms = [OURS, OVERLAY, ALONE]
    results: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in arms}
    firsts: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        model, overlay = make_models(Path(name), args.model)
        for number in range(rounds):
            for arm in arms[number % 3 :] + arms[: number % 3]:
                print(f"{arm}:", file=sys.stderr, flush=True)
                command = command_of(arm, model, overlay, args.attention)
                with serving(arm, command, Path(name) / "log") as address:
                    found, first = asyncio.run(
                        measure(address, concurrencies, long_tokens, number, is_large)
                    )
                results[arm].append(found)
                if first is not None:
                    firsts[arm] = first
    return report(args, concurrencies, results, firsts, long_tokens)


def report(
    args: Any,
    concurrencies: list[int],
    results: dict[str, list[list[dict[str, Any]]]],
    firsts: dict[str, float],
    long_tokens: int,
) -> int:
    """Tables, targets, the exit code.

    Args:
        results: of every arm and round, a summary of each concurrency.
    """
    rows, targets, ratios = [], [], []
    for index, count in enumerate(concurrencies):
        of_count = {arm: [r[index] for r in found] for arm, found in results.items()}
        rates = {
            arm: [one["output_tokens_per_second"] for one in found]
            for arm, found in of_count.items()
        }
        ours, overlay, alone = (median(rates[arm]) for arm in (OURS, OVERLAY, ALONE))
        first = [
            f"{median(one['ttft']['p50'] for one in of_count[arm]) * 1e3:.0f}"
            for arm in results
        ]
        rows.append(
            [
                str(count),
                *(_with_range(rates[arm]) for arm in (OURS, OVERLAY, ALONE)),
                f"{ours / overlay:.2f}",
                f"{ours / alone:.2f}",
                " / ".join(first),
            ]
        )
        ratios.append(ours / overlay)
        least = 1.5 if count >= 8 else 1.0
        name = f"tokens/s over the overlay's, {count} at once"
        targets.append(Target(name, ours / overlay, least, at_least=True))
        name = f"tokens/s over mlx_lm.server's on one rank, {count} at once"
        targets.append(Target(name, ours / alone, 1.0, at_least=True))
    headers = [
        "at once", "ours, tokens/s", OVERLAY, ALONE, "over overlay", "over one rank",
        "TTFT p50, ms",
    ]  # fmt: skip
    print(markdown_table(headers, rows) + "\n")
    if firsts:
        print(
            f"TTFT of a short request beside a prompt of {long_tokens} tokens: "
            + ", ".join(f"{arm} {s * 1e3:.0f} ms" for arm, s in firsts.items())
            + "\n"
        )
    for arm in (OVERLAY, ALONE) if firsts else ():
        share = firsts[OURS] / firsts[arm]
        targets.append(Target(f"TTFT beside a long prompt over {arm}", share, 0.25))
    records = [
        {"arm": arm, "round": number, **one}
        for arm, found in results.items()
        for number, summaries in enumerate(found)
        for one in summaries
    ]
    failed = sum(record["failed"] for record in records)
    targets.append(Target("requests that failed", failed, 0))
    records += [{"arm": arm, "ttft_beside_long": s} for arm, s in firsts.items()]
    figure = (
        f"tokens/s over mlx_lm.server under the overlay: {min(ratios):.2f} x to "
        f"{max(ratios):.2f} x"
    )
    return finish(args, records, targets, figure)


def _with_range(rates: list[float]) -> str:
    if len(rates) == 1:
        return f"{rates[0]:.0f}"
    return f"{median(rates):.0f} ({min(rates):.0f} .. {max(rates):.0f})"


if __name__ == "__main__":
    sys.exit(main())
