"""Steps in two micro-batches, and the way of each size that is measured to be best."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
LEAST_SAMPLES, MOST_SAMPLES = 5, 41
SAMPLE_SECONDS = 0.5  # about what the samples of one mode and size may take
MORE_SECONDS = 1.0  # and more of them, where a mode may gain and it is not clear
# Of the time without overlap, in turns of their own; less is not worth a change.
LEAST_GAIN = 0.98
# How often a mode that gains nothing may be the faster one in as many turns.
MOST_CHANCE = 0.05
# A size whose first step takes longer is not timed, nor are larger ones.
MOST_SECONDS = 1.0


@dataclass(frozen=True)
class OverlapTable:
    """What each size of a step was measured to take, on the slowest rank.

    Attributes:
        samples: (kind, tokens) -> mode -> seconds of each turn. In a turn all modes
            ran, one after another, so that they are compared turn by turn: a host that
            is busy for a while is so for all of them.
    """

    samples: dict[tuple[StepKind, int], dict[OverlapMode, tuple[float, ...]]]

    @cached_property
    def seconds(self) -> dict[tuple[StepKind, int], dict[OverlapMode, float]]:
        """(kind, tokens) -> mode -> median."""
        return {
            step: {mode: statistics.median(times) for mode, times in modes.items()}
            for step, modes in self.samples.items()
        }

    @cached_property
    def chosen(self) -> dict[tuple[StepKind, int], OverlapMode]:
        """(kind, tokens) -> the mode of such a step; none unless another one gains."""
        return {step: _gaining(modes) for step, modes in self.samples.items()}

    def choose(self, kind: StepKind, num_tokens: int) -> OverlapMode:
        """The mode of a step: that of the largest size that is not larger."""
        sizes = [size for known, size in self.samples if known == kind]
        below = [size for size in sizes if size <= num_tokens]
        if not sizes:
            return "none"
        return self.chosen[kind, max(below) if below else min(sizes)]

    def explain(self) -> str:
        """Every time, turns that were faster than `none`, and the choice: Markdown."""
        modes = list(next(reversed(self.samples.values()), {}))
        rows = [
            (f"{kind}, {size} tokens", self.choose(kind, size),
             *(self._text((kind, size), mode) for mode in modes))
            for kind, size in self.samples
        ]  # fmt: skip
        return markdown_table(("ms per step", "chosen", *modes), rows, left=2)

    def _text(self, step: tuple[StepKind, int], mode: OverlapMode) -> str:
        """``1.234 (19/21)``: the median, and in how many turns it gained."""
        times = self.samples[step]
        if mode not in times:
            return "-"
        median = f"{self.seconds[step][mode] * 1e3:.3f}"
        if mode == "none":
            return median
        ratios = _ratios(times, mode)
        return f"{median} ({sum(r < 1 for r in ratios)}/{len(ratios)})"


def _ratios(
    samples: dict[OverlapMode, tuple[float, ...]], mode: OverlapMode
) -> list[float]:
    """Of a mode's time to that of `none` in the same turn."""
    pairs = zip(samples[mode], samples["none"], strict=True)
    return [one / none for one, none in pairs]


def _gaining(samples: dict[OverlapMode, tuple[float, ...]]) -> OverlapMode:
    """The mode that gains most: enough, and in so many turns that it is no chance."""
    gains: dict[OverlapMode, float] = {}
    for mode in samples:
        ratios = _ratios(samples, mode)
        gain, wins = statistics.median(ratios), sum(r < 1 for r in ratios)
        if gain < LEAST_GAIN and _is_sure(wins, len(ratios)):
            gains[mode] = gain
    return min(gains, key=lambda mode: gains[mode], default="none")


def _is_unclear(samples: dict[OverlapMode, tuple[float, ...]]) -> bool:
    """Whether a mode may gain and has not been shown to."""
    return (
        any(statistics.median(_ratios(samples, mode)) < 1 for mode in samples)
        and _gaining(samples) == "none"
    )


def _is_sure(wins: int, turns: int) -> bool:
    """The sign test: would a coin show so many heads, or more, too rarely?"""
    ways = sum(math.comb(turns, heads) for heads in range(wins, turns + 1))
    return ways <= MOST_CHANCE * 2**turns


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
) -> dict[tuple[StepKind, int], dict[OverlapMode, tuple[float, ...]]]:
    """The times of each mode, for every size."""
    found: dict[tuple[StepKind, int], dict[OverlapMode, tuple[float, ...]]] = {}
    for kind in get_args(StepKind):
        for size in SIZES[kind]:
            times = _measure_size(model, two_batch, comm, kind, size)
            if times is None:
                break
            found[kind, size] = times
    return found


def _measure_size(
    model: nn.Module, two_batch: TwoBatch, comm: Comm, kind: StepKind, size: int
) -> dict[OverlapMode, tuple[float, ...]] | None:
    """The modes in turn, there and back; None: it takes too long."""
    modes: list[OverlapMode] = ["none", "single", "two"]
    if (kind, size) == ("decode", 1):
        modes.remove("two")
    steps = {mode: step_of(model, kind, size) for mode in modes}
    samples: dict[OverlapMode, list[float]] = {mode: [] for mode in modes}

    def take(turns: int) -> dict[OverlapMode, tuple[float, ...]]:
        """So many turns more; all so far, of the slowest rank. Alike on all ranks."""
        for turn in range(turns):
            for mode in modes[::-1] if turn % 2 else modes:
                two_batch.choose = always(mode)
                comm.barrier()
                start = time.perf_counter()
                steps[mode]()
                samples[mode].append(time.perf_counter() - start)
        ranks = gather_objects(comm, list(samples.values()))  # [rank][mode][turn]
        slowest = [tuple(map(max, zip(*times))) for times in zip(*ranks)]
        return dict(zip(modes, slowest, strict=True))

    longest = max(times[0] for times in take(1).values())
    if longest > MOST_SECONDS and size > SIZES[kind][0]:
        return None
    for times in samples.values():  # the first ones build kernels and make room
        times.clear()
    found = take(min(max(int(SAMPLE_SECONDS / longest), LEAST_SAMPLES), MOST_SAMPLES))
    more = min(int(MORE_SECONDS / longest), 2 * MOST_SAMPLES)
    return take(more) if more and _is_unclear(found) else found


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
