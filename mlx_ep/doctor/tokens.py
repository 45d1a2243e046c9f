"""Text by all ranks against text by one process, with the model in the package."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.utils import load as load_plain

from mlx_ep.api import prepare
from mlx_ep.comm import Comm
from mlx_ep.config import EPConfig
from mlx_ep.loading import EMBEDDED_MODEL, find_model
from mlx_ep.measure import Check

PROMPT = "A program that"
NUM_TOKENS = 24


def check_tokens(comm: Comm) -> Check:
    """Greedy tokens of `jargon-moe`; every rank must call it.

    Returns:
        The part of the tokens that differ from those of mlx-lm on this rank alone.
    """
    config = EPConfig(warmup=False)
    model, tokenizer = prepare(EMBEDDED_MODEL, comm, config).load()
    prompt = mx.array(tokenizer.encode(PROMPT))
    got, seconds = _greedy(model, prompt)
    comm.barrier()  # mlx-lm has begun a step more, with collectives
    plain, _, *_ = load_plain(str(find_model(EMBEDDED_MODEL)))
    expected, plain_seconds = _greedy(plain, prompt)
    different = sum(a != b for a, b in zip(got, expected, strict=True))
    return Check(
        what=f"{NUM_TOKENS} tokens of {EMBEDDED_MODEL}",
        error=different / NUM_TOKENS,
        tolerance=0.0,
        seconds=seconds / NUM_TOKENS,
        plain_seconds=plain_seconds / NUM_TOKENS,
    )


def _greedy(model: nn.Module, prompt: mx.array) -> tuple[list[int], float]:
    """Tokens, and the seconds of all of them but the first."""
    steps: Any = generate_step(prompt, model, max_tokens=NUM_TOKENS + 1)
    tokens = [int(next(steps)[0])]
    start = time.perf_counter()
    tokens += [int(token) for token, _ in steps]
    return tokens[:NUM_TOKENS], time.perf_counter() - start
