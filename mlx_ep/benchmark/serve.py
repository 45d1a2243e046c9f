"""``mlx_ep.benchmark serve``: a load on any OpenAI endpoint, and what its clients see.

TTFT is the time from a request to its first text, ITL the time between two parts of a
text, TPOT the time from the first text to the last over the tokens behind the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_ep import cli
from mlx_ep.benchmark.load import Ask, Reply, Target, arrivals, run_load
from mlx_ep.benchmark.plot import check_can_plot
from mlx_ep.benchmark.serve_plot import plot_loads
from mlx_ep.benchmark.shapes import parse_counts
from mlx_ep.metrics import markdown_table
from mlx_ep.simulate.traces import read_trace

PERCENTILES = (50, 90, 95, 99)
KEY_VARIABLES = ("OPENAI_API_KEY", "MLX_EP_API_KEY")


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.benchmark serve",
        description="A load on an OpenAI endpoint: so many requests at a time, or at "
        "random times, or as a trace has them.",
    )
    parser.add_argument(
        "--base-url",
        default="http://127.0.0.1:8080/v1",
        metavar="URL",
        help="Of the API.",
    )
    parser.add_argument("--model", default="default_model", help="As requests say it.")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"(default: {' or '.join(KEY_VARIABLES)} of the environment).",
    )
    parser.add_argument(
        "--endpoint", choices=("chat", "completions"), default="chat", help="Which API."
    )
    parser.add_argument(
        "--num-requests",
        "-n",
        type=cli.at_least(0),
        default=0,
        help="How many (default: 64, or all of --dataset).",
    )
    parser.add_argument(
        "--concurrency",
        default=None,
        metavar="N,...",
        help="Requests that are open at once; several as a comma list, one after the "
        "other (default: 8, without --rate and --dataset).",
    )
    parser.add_argument(
        "--rate", type=cli.above_zero, help="Requests a second, at Poisson times."
    )
    parser.add_argument(
        "--input-tokens", type=cli.positive, default=256, help="Of a prompt, about."
    )
    parser.add_argument(
        "--output-tokens", type=cli.positive, default=64, help="Of an answer, at most."
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="A trace in the format of mlx_ep.simulate: lengths and arrivals.",
    )
    parser.add_argument(
        "--token-ids",
        action="store_true",
        help="Send the token ids of --dataset as prompts (to /v1/completions).",
    )
    parser.add_argument(
        "--body",
        type=cli.json_object,
        default="{}",
        metavar="JSON",
        help="Further fields of every request, such as '{\"temperature\":0.7}'.",
    )
    parser.add_argument(
        "--warmup", type=cli.at_least(0), default=2, help="Requests before the first."
    )
    parser.add_argument(
        "--timeout", type=cli.above_zero, default=600.0, help="Seconds for an answer."
    )
    parser.add_argument(
        "--seed", type=cli.at_least(0), default=0, help="Of texts and times."
    )
    cli.add_json_flag(parser, "what was measured")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="Draw it (needs matplotlib)."
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="A JSON line per request, for mlx_ep.simulate calibrate and validate "
        "--measured; of one load.",
    )
    parser.finishers.append(_check)
    return parser


def _check(args: argparse.Namespace) -> None:
    if not args.base_url.startswith(("http://", "https://")):
        raise ValueError(f"--base-url must be an http address; got {args.base_url}.")
    if args.rate is not None and args.dataset is not None:
        raise ValueError("--rate has no effect with --dataset, which has arrivals.")
    is_open = args.rate is not None or args.dataset is not None
    text = args.concurrency or ("" if is_open else "8")
    args.concurrency = list(parse_counts("--concurrency", text)) if text else [None]
    if args.record is not None and len(args.concurrency) > 1:
        raise ValueError("--record takes one --concurrency.")
    if args.token_ids and args.dataset is None:
        raise ValueError("--token-ids needs the ids of a --dataset.")
    for flag, file, endings in (
        ("--record", args.record, ()),
        ("--json", None if str(args.json) == "-" else args.json, ()),
        ("--plot", args.plot, cli.PICTURES),
    ):
        if file is not None:
            cli.check_output(flag, file, endings)
    if args.plot is not None:
        check_can_plot()
    args.asked = _asked(args)


def _asked(args: argparse.Namespace) -> list[Ask]:
    if args.dataset is not None:
        return _from_trace(args.dataset, args.num_requests, args.token_ids)
    count = args.num_requests or 64
    asked = [Ask(args.input_tokens, args.output_tokens)] * count
    return arrivals(asked, args.rate, args.seed) if args.rate else asked


def _from_trace(file: Path, count: int, with_ids: bool) -> list[Ask]:
    asked: list[Ask] = []
    for session in read_trace(file).first(count).sessions:
        before: int | None = None
        for one in session:
            if with_ids and one.input_ids is None:
                raise ValueError(
                    f"{file}: line {one.line}: must have input_tok_ids for --token-ids."
                )
            ids = one.input_ids if with_ids else None
            at = one.arrival / 1e9
            asked.append(Ask(one.input_tokens, one.output_tokens, at, before, ids))
            before = len(asked) - 1
    return asked


def summary(replies: Sequence[Reply], concurrency: int | None) -> dict[str, Any]:
    """What a load saw: counts, rates, and percentiles in s.

    Raises:
        ValueError: no request was answered.
    """
    good = [reply for reply in replies if not reply.error]
    if not good:
        raise ValueError(f"No request was answered: {replies[0].error}")
    start = min(reply.sent for reply in replies)
    seconds = max(reply.ended for reply in replies) - start
    outputs = sum(reply.output_tokens for reply in good)
    inputs = sum(reply.input_tokens for reply in good)
    values = {
        "ttft": [reply.ttft for reply in good],
        "itl": [gap for reply in good for gap in reply.gaps],
        "tpot": [reply.tpot for reply in good if reply.output_tokens > 1],
        "latency": [reply.last - reply.sent for reply in good],
    }
    return {
        "concurrency": concurrency,
        "requests": len(good),
        "failed": len(replies) - len(good),
        "errors": sorted({reply.error for reply in replies if reply.error})[:5],
        "seconds": seconds,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": outputs / seconds,
        "tokens_per_second": (inputs + outputs) / seconds,
        **{name: _moments(found) for name, found in values.items()},
    }


def _moments(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    array = np.array(values)  # on host
    percentiles = np.percentile(array, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(array.mean()), **named}


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row a load."""
    headers = ["open", "requests", "failed", "requests/s", "output tokens/s"]
    for name in ("TTFT", "ITL", "TPOT"):
        headers += [f"{name} p50, ms", f"p{PERCENTILES[-1]}"]
    rows = []
    for one in summaries:
        row = [
            "any" if one["concurrency"] is None else str(one["concurrency"]),
            str(one["requests"]),
            str(one["failed"]),
            f"{one['requests_per_second']:.2f}",
            f"{one['output_tokens_per_second']:.1f}",
        ]
        for name in ("ttft", "itl", "tpot"):
            for key in ("p50", "p99"):
                row.append(f"{one[name][key] * 1e3:.1f}" if one[name] else "-")
        rows.append(row)
    return markdown_table(headers, rows)


async def measure(args: argparse.Namespace) -> list[tuple[int | None, list[Reply]]]:
    """All loads, one after the other.

    Raises:
        ValueError: the server does not answer.
    """
    keys = [os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)]
    key = args.api_key or (keys[0] if keys else None)
    most = max((count or len(args.asked)) for count in args.concurrency)
    target = Target(
        args.base_url, args.model, key, args.body, most, args.timeout,
        chat=args.endpoint == "chat",
    )  # fmt: skip
    found = []
    async with target:
        await target.measure_words()
        warm = [Ask(args.input_tokens, args.output_tokens)] * args.warmup
        await run_load(target, warm, None, seed=-1)
        for number, concurrency in enumerate(args.concurrency):
            with tqdm(total=len(args.asked), unit="req", leave=False) as bar:

                def count(_: Reply, bar: Any = bar) -> None:
                    bar.update()

                replies = await run_load(
                    target,
                    args.asked,
                    concurrency,
                    args.seed + number,  # a prompt that is known would cost nothing
                    count,
                )
            found.append((concurrency, replies))
    return found


def main(argv: Sequence[str]) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        loads = asyncio.run(measure(args))
        summaries = [summary(replies, count) for count, replies in loads]
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    out = cli.beside(args)
    print(table(summaries), file=out)
    for one in summaries:
        for problem in one["errors"]:
            print(f"failed: {problem}", file=out)
    if args.record is not None:
        lines = [json.dumps(r.record()) for r in loads[0][1] if not r.error]
        with cli.whole_file(args.record) as part:
            part.write_text("\n".join(lines) + "\n")
    if args.json is not None:
        cli.write_json(args.json, {"url": args.base_url, "loads": summaries})
    if args.plot is not None:
        plot_loads(args.plot, args.base_url, loads, summaries)
