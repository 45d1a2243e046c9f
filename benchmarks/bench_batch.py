"""How many sequences per second does data-parallel generation finish?

64 prompts of 5 to 300 tokens on the embedded model, 24 greedy tokens each, on 2 to 4
ranks over MPI: each sharded strategy with data-parallel attention, beside `replicated`
(every rank runs attention for every sequence). Also the KV memory per rank, and
whether the tokens are those of mlx-lm in one process.

    python -m benchmarks.bench_batch --check
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import batch_generate

import mlx_ep
from benchmarks.harness import Target, arguments, finish, heading, run_pinned
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.data_parallel import generate_replicated, generate_sharded
from mlx_ep.loading import find_model
from mlx_ep.metrics import format_bytes, markdown_table

ARMS: dict[str, dict[str, Any]] = {
    "replicated": {"strategy": "replicated"},
    "gathered": {"strategy": "gathered"},
    "all_to_all, normal": {"strategy": "all_to_all", "mode": "normal"},
    "all_to_all": {"strategy": "all_to_all"},
    "auto": {"strategy": "auto"},
}
MAX_TOKENS = 24


def prompts_of(count: int, longest: int) -> list[list[int]]:
    """Token ids of prompts whose lengths go evenly from 5 to `longest`, shuffled."""
    rng = random.Random(1)
    lengths = [5 + (longest - 5) * i // max(count - 1, 1) for i in range(count)]
    rng.shuffle(lengths)
    return [[0, *(rng.randrange(20, 1000) for _ in range(n - 1))] for n in lengths]


def greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def run_arms(
    group: mx.distributed.Group, prompts: list[list[int]], samples: int
) -> dict[str, Any]:
    """Per arm: seconds of each run, the tokens, the KV bytes of every rank."""
    comm = GroupComm(group)
    folder = str(find_model("jargon-moe"))
    loaded = {
        name: mlx_ep.load(folder, group, EPConfig(**config))
        for name, config in ARMS.items()
    }
    results: dict[str, Any] = {name: {"seconds": []} for name in ARMS}
    for sample in range(samples + 1):
        for name, (model, tokenizer) in loaded.items():
            generate = generate_replicated if name == "replicated" else generate_sharded
            comm.barrier()
            start = time.perf_counter()
            result = generate(
                model,
                tokenizer,
                prompts if sample else prompts[:4],  # the first is the warm-up
                comm,
                max_tokens=MAX_TOKENS,
                sampler=greedy,
                prefill_step_size=128,
            )
            if sample:
                results[name]["seconds"].append(time.perf_counter() - start)
            results[name]["tokens"] = [answer.tokens for answer in result.answers]
            results[name]["cache_bytes"] = result.cache_bytes
    return results


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=3).parse_args()
    count, longest = (12, 80) if args.quick else (64, 300)
    all_ranks = [2] if args.quick else [2, 3, 4]
    prompts = prompts_of(count, longest)
    print(heading(f"Batch generation: {count} prompts of 5 to {longest} tokens"))

    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    single = batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=MAX_TOKENS,
        return_token_ids=True,
    ).token_ids
    records: list[dict[str, Any]] = []
    differing = 0
    for num_ranks in all_ranks:
        ranks = run_pinned(
            num_ranks, run_arms, prompts, args.samples, transport="mpi", timeout=3000
        )
        results = ranks[0]
        base = sorted(results["replicated"]["seconds"])[args.samples // 2]
        rows = []
        for name, result in results.items():
            median = sorted(result["seconds"])[len(result["seconds"]) // 2]
            wrong = sum(a != b for a, b in zip(result["tokens"], single, strict=True))
            differing += wrong
            cache_bytes = result["cache_bytes"]
            records.append(
                {
                    "ranks": num_ranks,
                    "arm": name,
                    "sequences_per_second": count / median,
                    "ratio_to_replicated": base / median,
                    "cache_bytes": cache_bytes,
                    "differing": wrong,
                }
            )
            rows.append(
                [
                    name,
                    f"{count / median:.2f}",
                    f"{base / median:.2f}",
                    ", ".join(format_bytes(n) for n in cache_bytes),
                    f"{wrong} of {count}",
                ]
            )
        print(f"\n## {num_ranks} ranks over MPI\n")
        headers = ["arm", "sequences/s", "over replicated", "KV per rank", "differ"]
        print(markdown_table(headers, rows), flush=True)
    best = max(r["ratio_to_replicated"] for r in records if r["arm"] != "replicated")
    targets = [Target("sequences whose tokens differ from one process", differing, 0)]
    figure = f"best sharded strategy over replicated: {best:.2f} x the sequences/s"
    print()
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    sys.exit(main())
