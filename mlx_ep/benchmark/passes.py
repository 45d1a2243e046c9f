"""Single forward passes: the same logits, what they move, where their time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.benchmark.models import ModelArm
from mlx_ep.comm import GroupComm, gather_objects
from mlx_ep.metrics import STAGES
from mlx_ep.types import to_host

CHECK_TOKENS = 16
# Median over positions of the largest difference of logits, of the largest logit: in 16
# bits a near-tie of two experts may go either way at some positions.
TOLERANCES = {mx.float32: 1e-3, mx.bfloat16: 5e-2, mx.float16: 5e-2}
COLLECTIVES = ("all_sum", "all_max", "all_min", "all_gather", "sum_scatter", "send")


def staged_pass(arm: ModelArm, tokens: mx.array, cache: Any) -> dict[str, float]:
    """One forward pass of this rank's tokens ``[B, L]``; seconds of each stage."""
    if arm.is_idle:
        return dict.fromkeys(STAGES, 0.0)
    assert arm.model is not None
    if arm.group is None:
        mx.eval(arm.model(tokens, cache=cache))  # sync: one pass, for its collectives
        return dict.fromkeys(STAGES, 0.0)
    group = arm.group
    if not arm.is_sharded:
        with group.timings.measure() as timings:
            mx.eval(arm.model(tokens, cache=cache))  # sync: timed by stage
            return dict(timings.seconds)
    with group.agreed(tokens.size), group.timings.measure() as timings:
        if tokens.size:
            mx.eval(arm.model(tokens, cache=cache))  # sync: timed by stage
        else:
            for state in arm.model.expert_parallel.blocks:
                state.serve()
        return dict(timings.seconds)


def check_same_logits(
    arms: Sequence[ModelArm], vocabulary: int, seed: int, comm: GroupComm
) -> None:
    """Every arm's logits are the first one's, within rounding. On every rank.

    Raises:
        RuntimeError: on every rank, if it is not so on any.
    """
    random = np.random.default_rng(seed)
    tokens = mx.array(random.integers(1, vocabulary, (1, CHECK_TOKENS)))
    logits: dict[str, mx.array] = {}
    for arm in arms:
        comm.barrier()
        if arm.is_idle:
            continue
        arm.enter()
        assert arm.model is not None
        run = partial(arm.model, tokens, cache=make_prompt_cache(arm.model))
        if arm.group is not None and arm.is_sharded:
            with arm.group.agreed(tokens.size):
                found = run()
                mx.eval(found)  # sync: before anything is timed
        else:
            found = run()
            mx.eval(found)  # sync: before anything is timed
        logits[arm.name] = found
    problem = ""
    names = list(logits)
    for name in names[1:]:
        error = logits_difference(logits[names[0]], logits[name])
        if error > TOLERANCES[logits[name].dtype]:
            problem = f"logits of arm {name} differ from arm {names[0]} by {error:.1e}"
    if found_problems := [p for p in gather_objects(comm, problem) if p]:
        raise RuntimeError(f"The arms are not the same model: {found_problems[0]}.")


def logits_difference(a: mx.array, b: mx.array) -> float:
    """Median over positions of the largest difference, of the largest logit."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    worst = mx.abs(a - b).max(axis=-1) / mx.maximum(mx.abs(a).max(), 1e-30)
    # sync: of one sample, before anything is timed.
    return float(np.median(to_host(worst)))


@contextmanager
def count_collectives() -> Iterator[list[int]]:
    """[collectives, bytes] that this process starts inside, mlx-lm's own included.

    Barriers are all_sums of one number, and are counted as neither.
    """
    counted = [0, 0]
    originals = {name: getattr(mx.distributed, name) for name in COLLECTIVES}

    def counting(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            if x.size > 1:
                counted[0] += 1
                counted[1] += x.nbytes
            return original(x, *args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(mx.distributed, name, counting(original))
        yield counted
    finally:
        for name, original in originals.items():
            setattr(mx.distributed, name, original)
