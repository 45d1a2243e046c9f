"""Which passes ranks share, though each could compute its own tokens alone.

Where every rank has every expert no layer needs an exchange. But with few requests some
ranks have no tokens and idle, and with many each rank reads nearly every expert, of
which it needs to read only its part where ranks share. What an exchange costs beside
that depends on the model, the machine and the network. So both are timed at the start,
with tokens on one rank and with as many on each, and every pass goes the faster way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.comm import Comm, gather_objects
from mlx_ep.server.cores import share_cores
from mlx_ep.types import TokenCounts

SIZES = (1, 4, 16, 64)  # tokens of a rank that has some
SAMPLES = 2
# A pass that takes longer is timed once, and the last one: s. What is faster there is
# so for more tokens.
LONG = 0.5
CLEARLY = 0.9  # of the time apart: what a shared pass has to take less than


@dataclass(frozen=True)
class Sharing:
    """Seconds of passes, apart and shared; where nothing was timed none is shared.

    Attributes:
        on_one: by tokens, where one rank has them.
        on_each: by tokens of each rank.
    """

    on_one: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    on_each: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def shares(self, counts: Sequence[int]) -> bool:
        """Whether a pass is shared. Pure, so that all ranks decide alike.

        Args:
            counts: tokens of every rank.
        """
        most = max(counts)
        # Ranks with less than half of the busiest one's are as good as idle.
        times = self.on_each if 2 * min(counts) >= most else self.on_one
        sizes = [size for size in times if size <= most]
        if not sizes:
            return False
        apart, shared = times[max(sizes)]
        return shared < CLEARLY * apart

    def __str__(self) -> str:
        """For a person; "" where nothing was timed."""
        parts = [
            f"{size} token{'s' * (size > 1)} on {where} {apart * 1e3:.3g} ms alone, "
            f"{shared * 1e3:.3g} shared"
            for where, times in (("one rank", self.on_one), ("each", self.on_each))
            for size, (apart, shared) in times.items()
        ]
        if not parts:
            return ""
        return f"passes go the faster way: {'; '.join(parts)}"


def measure_sharing(model: nn.Module, comm: Comm, vocabulary: int) -> Sharing:
    """Time passes apart and shared; every rank must call it.

    Nothing is timed where passes cannot be shared, or have to be. All tokens differ, so
    that they want different experts; caches are empty.

    Args:
        vocabulary: tokens that there are.
    """
    parallel = model.expert_parallel
    if comm.size == 1 or not parallel.can_share:
        return Sharing()
    timed = partial(_seconds, model, comm, vocabulary)
    found = []
    timed([1] * comm.size, False)  # the threads that compute exist
    cores = share_cores(comm, True)  # as while it serves
    cores.keep(True)
    for has_tokens in ([rank == 0 for rank in range(comm.size)], [True] * comm.size):
        times: dict[int, tuple[float, float]] = {}
        for size in SIZES:
            counts = [size * has for has in has_tokens]
            timed(counts, False)  # kernels, buffers, weights
            apart = timed(counts, False)
            number = 1 if apart > LONG else SAMPLES
            shared = [timed(counts, True) for _ in range(number)]
            more = [timed(counts, False) for _ in range(number - 1)]
            times[size] = min([apart, *more]), min(shared)
            if apart > LONG:
                break
        found.append(times)
    cores.keep(False)
    return Sharing(*found)


def _seconds(
    model: nn.Module,
    comm: Comm,
    vocabulary: int,
    counts: Sequence[int],
    is_shared: bool,
) -> float:
    """Of a pass, on the rank that took longest; the same number on every rank."""
    parallel, count = model.expert_parallel, counts[comm.rank]
    step = parallel.group.step
    step.tokens, step.is_shared = TokenCounts(tuple(counts)), is_shared
    comm.barrier()
    start = time.perf_counter()
    if count:
        # Other tokens, other experts.
        tokens = mx.arange(1, count + 1, dtype=mx.int32)[:, None] % vocabulary
        # sync: what is timed.
        mx.eval(model(tokens, cache=make_prompt_cache(model)))
    else:
        parallel.serve()
    seconds: list[float] = gather_objects(comm, time.perf_counter() - start)
    step.is_shared = False
    return max(seconds)
