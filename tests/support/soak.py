"""Half an hour of answers on 2 ranks: are the tokens right and is memory flat?

    python -m tests.support.soak [--minutes 30] [--ranks 2] [--json FILE]

Every answer is compared with that of mlx-lm in one process. Memory is what each rank
holds resident, the watch of each rank too: its median in the last tenth of the run may
be 2 percent above that of the first tenth after a warm-up. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.ranks import run_commands

PROMPTS = ("What is a hacker?", "What is spaghetti code?", "What is a kluge?")
TOKENS = 24
WARM_UP = 0.1  # of the run
MOST_GROWTH = 1.02


def rank_main(minutes: float, expected: list[list[int]]) -> None:
    """What each rank does; it prints a line of JSON at the end."""
    import mlx_lm

    import mlx_ep
    from mlx_ep.comm import broadcast_object, init, note_decode, note_prefill

    comm = init()
    with mlx_ep.guard(comm.group):
        model, tokenizer = mlx_ep.load("jargon-moe", comm.group)
        start = time.monotonic()
        samples, num_answers, wrong = [], 0, 0
        processes = [psutil.Process(), *psutil.Process().children()]
        while True:
            seconds = broadcast_object(comm, time.monotonic() - start)
            if seconds > 60 * minutes:
                break
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                got = [
                    response.token
                    for response in note_decode(
                        mlx_lm.stream_generate(
                            model,
                            tokenizer,
                            chat(tokenizer, prompt),
                            max_tokens=TOKENS,
                            prompt_progress_callback=note_prefill,
                        )
                    )
                ]
                num_answers += 1
                wrong += got != tokens
            samples.append([seconds, *(p.memory_info().rss for p in processes)])
    print(json.dumps({"answers": num_answers, "wrong": wrong, "samples": samples}))


def chat(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    tokens: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True
    )
    return tokens


def expected_tokens() -> list[list[int]]:
    """What mlx-lm answers in one process."""
    import mlx_lm

    from mlx_ep.loading import find_model

    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    return [
        [
            response.token
            for response in mlx_lm.stream_generate(
                model, tokenizer, chat(tokenizer, prompt), max_tokens=TOKENS
            )
        ]
        for prompt in PROMPTS
    ]


def growth(samples: list[list[float]], column: int) -> float:
    """Resident bytes of the last tenth of the run to those of the first tenth."""
    settled = [sample for sample in samples if sample[0] >= WARM_UP * samples[-1][0]]
    tenth = max(1, len(settled) // 10)
    first, last = (
        statistics.median(sample[column] for sample in part)
        for part in (settled[:tenth], settled[-tenth:])
    )
    return last / first


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.support.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="Where all samples are written.")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.minutes, json.loads(args.rank))
        return
    command = [
        sys.executable,
        "-m",
        "tests.support.soak",
        "--minutes",
        str(args.minutes),
    ]
    command += ["--rank", json.dumps(expected_tokens())]
    outcomes = run_commands(args.ranks, command, timeout=60 * args.minutes + 300)
    is_good, records = True, []
    for rank, outcome in enumerate(outcomes):
        if outcome.returncode != 0:
            sys.exit(f"rank {rank} ended with {outcome.returncode}:\n{outcome.stderr}")
        record = json.loads(outcome.stdout.splitlines()[-1])
        records.append(record)
        samples = record["samples"]
        grown = [growth(samples, column) for column in range(1, len(samples[0]))]
        is_good = is_good and not record["wrong"] and max(grown) <= MOST_GROWTH
        own, watch = (samples[-1][column] / 2**20 for column in (1, -1))
        print(
            f"rank {rank}: {record['answers']} answers, {record['wrong']} wrong; "
            f"memory at the end {own:.0f} MiB, {grown[0]:.3f} times that at the start; "
            f"its watch {watch:.0f} MiB, {grown[-1]:.3f}"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(records))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
