"""Steps in two micro-batches, and the way of each size that is measured to be best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.comm import Comm, gather_objects
from mlx_ep.metrics import markdown_table
from mlx_ep.models import BlockState
from mlx_ep.models.halved_cache import why_not_halved
from mlx_ep.models.two_batch import Choose, StepKind, TwoBatch, install_two_batch
from mlx_ep.moe import ExpertGroup, OverlapMode

# Tokens of the steps that are timed; others go with the nearest one below.
SIZES: dict[StepKind, tuple[int, ...]] = {
    "decode": (1, 2, 4, 8, 16, 32),
    "prompt": (16, 64, 256, 1024),
}
LEAST_SAMPLES, MOST_SAMPLES = 5, 21
SAMPLE_SECONDS = 0.5  # about what the samples of one mode and size may take
# Of the time without overlap; what gains less may be noise, and lose next time.
LEAST_GAIN = 0.97
# A size whose first step takes longer is not timed, nor are larger ones.
MOST_SECONDS = 1.0


@dataclass(frozen=True)
class OverlapTable:
    """What each size of a step was measured to take, on the slowest rank.

    Attributes:
        seconds: (kind, tokens) -> mode -> median.
    """

    seconds: dict[tuple[StepKind, int], dict[OverlapMode, float]]

    def choose(self, kind: StepKind, num_tokens: int) -> OverlapMode:
        """The mode of a step; none where no other is faster by more than 3%."""
        sizes = [size for known, size in self.seconds if known == kind]
        below = [size for size in sizes if size <= num_tokens]
        if not sizes:
            return "none"
        times = self.seconds[kind, max(below) if below else min(sizes)]
        best = min(times, key=lambda mode: times[mode])
        return best if times[best] < LEAST_GAIN * times["none"] else "none"

    def explain(self) -> str:
        """Every time, and what was chosen, as a Markdown table."""
        modes = list(next(iter(self.seconds.values()), {}))
        rows = [
            (f"{kind}, {size} tokens", self.choose(kind, size),
             *(f"{times[mode] * 1e3:.3f}" for mode in modes))
            for (kind, size), times in self.seconds.items()
        ]  # fmt: skip
        return markdown_table(("ms per step", "chosen", *modes), rows, left=2)


def overlap_steps(
    model: nn.Module,
    group: ExpertGroup,
    blocks: Sequence[BlockState],
    wanted: OverlapMode,
) -> tuple[TwoBatch, OverlapTable | None]:
    """Let a model's steps overlap as the configuration says; every rank must call it.

    Args:
        wanted: ``two``, or ``auto``, which times steps first.

    Raises:
        ValueError: the model's caches cannot be cut.
    """
    caches = make_prompt_cache(model)
    if reason := why_not_halved(caches):
        raise ValueError(
            f"overlap={wanted!r} cuts a batch in two, and {reason} "
            f"({type(model).__module__}). Use --overlap single."
        )
    two_batch = TwoBatch(type(model), group, blocks, always("two"))
    install_two_batch(model, two_batch)
    if wanted == "two":
        return two_batch, None
    table = OverlapTable(_measure(model, two_batch, group.comm))
    two_batch.choose = table.choose
    group.counters.reset()  # as after any load
    return two_batch, table


def always(mode: OverlapMode) -> Choose:
    """Every step in one mode."""

    def choose(kind: StepKind, num_tokens: int) -> OverlapMode:
        return mode

    return choose


def _measure(
    model: nn.Module, two_batch: TwoBatch, comm: Comm
) -> dict[tuple[StepKind, int], dict[OverlapMode, float]]:
    """The median of each mode's times, for every size."""
    found: dict[tuple[StepKind, int], dict[OverlapMode, float]] = {}
    for kind in get_args(StepKind):
        for size in SIZES[kind]:
            times = _measure_size(model, two_batch, comm, kind, size)
            if times is None:
                break
            found[kind, size] = times
    return found


def _measure_size(
    model: nn.Module, two_batch: TwoBatch, comm: Comm, kind: StepKind, size: int
) -> dict[OverlapMode, float] | None:
    """The modes in turn, so that other load hits all alike; None: it takes too long."""
    modes: list[OverlapMode] = ["none", "single", "two"]
    if (kind, size) == ("decode", 1):
        modes.remove("two")
    steps = {mode: step_of(model, kind, size) for mode in modes}
    samples: dict[OverlapMode, list[float]] = {mode: [] for mode in modes}
    turns = 1
    turn = 0
    while turn < turns:
        for mode, step in steps.items():
            two_batch.choose = always(mode)
            comm.barrier()
            start = time.perf_counter()
            step()
            samples[mode].append(time.perf_counter() - start)
        if turn == 0:
            longest = max(times[0] for times in samples.values())
            longest = max(gather_objects(comm, longest))
            if longest > MOST_SECONDS and size > SIZES[kind][0]:
                return None
            wanted = int(SAMPLE_SECONDS / longest)
            turns += min(max(wanted, LEAST_SAMPLES), MOST_SAMPLES)
        turn += 1
    # The first one builds kernels and makes room.
    mine = [statistics.median(samples[mode][1:]) for mode in modes]
    slowest = [max(times) for times in zip(*gather_objects(comm, mine))]
    return dict(zip(modes, slowest, strict=True))


def step_of(model: nn.Module, kind: StepKind, size: int) -> Callable[[], None]:
    """One step of so many tokens, on caches of its own."""
    if kind == "prompt":
        tokens = mx.arange(size)[None] % 32
        return lambda: _evaluate(model, tokens, make_prompt_cache(model))
    single = make_prompt_cache(model)
    caches: list[Any] = [each.merge([each] * size) for each in single]
    tokens = mx.arange(size)[:, None] % 32
    return lambda: _evaluate(model, tokens, caches)


def _evaluate(model: nn.Module, tokens: mx.array, caches: list[Any]) -> None:
    logits = model(tokens, cache=caches)
    # sync: it is being timed.
    mx.eval(logits, [cache.state for cache in caches])
