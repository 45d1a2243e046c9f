"""Blocks whose code runs unchanged on every rank, completed by one sum over the ranks.

The tier below `routing_probe`: the gates stay inside the block. Its switch gives the
outputs of this rank's experts and exact zeros for the others, which are not computed.
Where the ranks' parts are added depends on the block:

- Its own code has a place for it (a `sharding_group`, for mlx-lm's tensor parallelism):
  before a norm, before what must count once. There.
- Else its output is added.

What every rank would add alike counts once: rank 0 runs the shared experts, the others
put zeros of the same shape in their place. That all this gives the block's output is
not assumed but tried, by `find_partial_sum`, with random numbers in the place of expert
outputs, split over ranks that are simulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.models.block_call import (
    BlockCall,
    RandomExperts,
    Reduce,
    Stub,
    tolerance,
)

_SIMULATED_RANKS = 3


@dataclass(frozen=True)
class PartialSum:
    """Where the ranks' parts of one block are added.

    Attributes:
        in_block: the block's own code adds them; else its output is added.
        shared_once: the shared experts go through that sum; else they are outside of
            it and every rank runs them.
    """

    in_block: bool
    shared_once: bool

    def output(
        self, call: BlockCall, switch: Stub, reduce: Reduce, has_shared: bool
    ) -> mx.array:
        """The block's output, from this rank's experts and one sum over the ranks.

        Args:
            switch: gives zeros for the experts of other ranks.
            reduce: adds the parts of all ranks; it is called once.
            has_shared: whether this rank is the one that the shared experts count on.
        """
        shared = _zeros_of if self.shared_once and not has_shared else None
        if self.in_block:
            return call.run(switch, shared, reduce)
        return reduce(call.run(switch, shared))


def _zeros_of(module: nn.Module, x: mx.array) -> mx.array:
    return mx.zeros_like(module(x))  # of its shape only: the module is not evaluated


def find_partial_sum(call: BlockCall) -> tuple[PartialSum | None, str]:
    """Where a block's parts have to be added, or None and the reason why nowhere.

    The block runs on random expert outputs in one piece, and as several ranks of which
    each has some of the experts; every rank's output must agree with it within the
    rounding of the block's dtype.
    """
    experts = RandomExperts()
    expected = call.run(experts)
    for candidate in _candidates(call):
        try:
            problem = _problem(candidate, call, experts, expected)
        except (ValueError, TypeError) as error:
            short = str(error).partition("\n")[0]
            problem = f"its code does not run on a part of the experts ({short})"
        if not problem:
            return candidate, ""
    return None, problem


def _candidates(call: BlockCall) -> list[PartialSum]:
    in_block = [PartialSum(True, True), PartialSum(True, False)]
    return (in_block if call.can_reduce else []) + [PartialSum(False, True)]


def _problem(
    candidate: PartialSum, call: BlockCall, experts: RandomExperts, expected: mx.array
) -> str:
    """Why a candidate does not give the block's output, or ""."""

    def run(rank: int, reduce: Reduce) -> mx.array:
        def switch(x: mx.array, ids: mx.array) -> mx.array:
            own = (ids % _SIMULATED_RANKS == rank)[..., None]
            return mx.where(own, experts(x, ids), 0)

        return candidate.output(call, switch, reduce, has_shared=rank == 0)

    parts: list[mx.array] = []

    def keep(part: mx.array) -> mx.array:
        parts.append(part)
        return part

    for rank in range(_SIMULATED_RANKS):
        run(rank, keep)
    if len(parts) != _SIMULATED_RANKS:
        return f"its code adds {len(parts) / _SIMULATED_RANKS:g} times over the ranks"
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        return "the parts of its sum have another shape on every rank"
    total = sum(parts[1:], parts[0])
    outputs = [run(rank, lambda _: total) for rank in range(_SIMULATED_RANKS)]
    largest = mx.stack([mx.abs(output - expected).max() for output in outputs]).max()
    # sync: once per block, when the model is made expert-parallel.
    if not (largest <= tolerance(expected)).item():
        return "its output is not one sum over the experts"
    return ""
