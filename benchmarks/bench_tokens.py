"""Does expert parallelism give the tokens and logits of mlx-lm in one process?

20 prompts on the embedded model, 64 greedy tokens each, on 1 to 4 ranks over the TCP
ring and 2 over MPI, against ``mlx_lm`` in one process; and the largest difference of
any logit when the model is fed the same prompt and answer in one piece.

    python -m benchmarks.bench_tokens --check
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step

import mlx_ep
from benchmarks.harness import Target, arguments, finish, heading, run_pinned
from mlx_ep.loading import find_model

PROMPTS = [
    "What is a hacker?", "foo", "Define kludge.", "bit bucket", "What is a glitch?",
    "cracker", "feature", "Define hack value.", "What is a core dump?", "magic",
    "munge", "wizard", "Define vaporware.", "spam", "What is a daemon?", "flame",
    "Unix", "What is the meaning of life?", "zen", "Define automagically.",
]  # fmt: skip
RUNS = [(1, "ring"), (2, "ring"), (3, "ring"), (4, "ring"), (2, "mpi")]
# A tie of two logits may be broken either way once sums are rounded differently; the
# embedded model's margins are far above this.
LOGIT_TOLERANCE = 1e-3


def answers(
    group: mx.distributed.Group | None, prompts: list[str], max_tokens: int
) -> list[tuple[list[int], np.ndarray]]:
    """Per prompt, the greedy tokens and the logits of prompt and answer.

    Args:
        group: the ranks; None for mlx-lm in this process.
    """
    model: Any
    folder = str(find_model("jargon-moe"))
    if group is None:
        model, tokenizer = mlx_lm.load(folder)
    else:
        model, tokenizer = mlx_ep.load(folder, group)
    results = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        # Not stream_generate, which would stop at the end of the answer.
        steps = generate_step(mx.array(ids), model, max_tokens=max_tokens)
        tokens = [token for token, _ in steps]
        logits = np.array(model(mx.array(ids + tokens)[None])[0])
        results.append((tokens, logits))
    return results


def compare(
    num_prompts: int, max_tokens: int, runs: list[tuple[int, str]]
) -> list[Any]:
    """One record per run: how many answers differ, and the largest logit difference."""
    prompts = PROMPTS[:num_prompts]
    expected = answers(None, prompts, max_tokens)
    records = []
    for num_ranks, transport in runs:
        ranks = run_pinned(
            num_ranks, answers, prompts, max_tokens, transport=transport, timeout=1800
        )
        pairs = [pair for got in ranks for pair in zip(got, expected, strict=True)]
        differing = sum(got[0] != wanted[0] for got, wanted in pairs)
        largest = max(
            np.abs(got[1] - wanted[1]).max() if got[0] == wanted[0] else np.inf
            for got, wanted in pairs
        )
        records.append(
            {
                "ranks": num_ranks,
                "transport": transport,
                "answers": len(pairs),
                "tokens": sum(len(got[0]) for got in ranks[0]),
                "differing_answers": differing,
                "largest_logit_difference": float(largest),
                "largest_logit": float(max(np.abs(w[1]).max() for w in expected)),
            }
        )
        print(
            f"{num_ranks} ranks, {transport}: {records[-1]['tokens']} tokens, "
            f"{differing} of {len(pairs)} answers (all ranks) differ, largest logit "
            f"difference {largest:.2e}",
            flush=True,
        )
    return records


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=1).parse_args()
    print(heading("Tokens and logits: expert parallelism against one process"))
    records = compare(2, 24, [(2, "ring")]) if args.quick else compare(20, 64, RUNS)
    differing = sum(record["differing_answers"] for record in records)
    largest = max(record["largest_logit_difference"] for record in records)
    targets = [
        Target("answers that differ", differing, 0),
        Target("largest difference of a logit", largest, LOGIT_TOLERANCE),
    ]
    figure = f"largest logit difference: {largest:.2e}"
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    sys.exit(main())
