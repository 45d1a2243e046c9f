"""What would make a model fit where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_ep.loading.estimate import (
    ModelOutline,
    RankNeed,
    Workload,
    rank_outline,
)
from mlx_ep.loading.working import working_memory
from mlx_ep.metrics import format_bytes
from mlx_ep.placement import Placement
from mlx_ep.plan.split import Split, SplitOf

_CONTEXT_STEP = 256  # tokens by which mlx-lm's caches grow


def advice(
    model: ModelOutline, split: Split, workload: Workload, split_of: SplitOf
) -> list[str]:
    """Sentences, each a way by itself.

    Args:
        split: that does not fit, of `workload`, with the memory of every rank.
        split_of: how another workload would be split, with the same flags.
    """
    placement, needs = split.placement, split.needs
    found = [memory_advice(needs), _more_ranks(model, placement, needs, workload)]
    found += [_context(workload, split_of)]
    if workload.attention != "tensor" and placement.num_ranks > 1:
        found.append(_tensor(workload, split_of))
    return [sentence for sentence in found if sentence]


def memory_advice(needs: Sequence[RankNeed]) -> str:
    """How much more memory those ranks need that have too little."""
    short = [need for need in needs if need.missing_bytes > 0]
    each = ", ".join(
        f"rank {need.rank} needs {format_bytes(need.total_bytes)}, "
        f"{format_bytes(need.missing_bytes)} more than it has"
        for need in short
    )
    return f"Memory: {each}."


def _more_ranks(
    model: ModelOutline,
    placement: Placement,
    needs: Sequence[RankNeed],
    workload: Workload,
) -> str:
    """With whole experts, further ranks being like the one with the most memory."""
    made = rank_outline(model, placement, 0, workload.attention)
    working = working_memory(made, workload.step_tokens)
    weights = -(-sum(need.expert_bytes for need in needs) // model.num_experts)
    # Rows of an expert come with the expert.
    each = weights + working.of(1, model.num_experts) - working.fixed
    rooms = []
    for need in needs:
        fixed = need.dense_bytes + need.cache_bytes + working.fixed
        rooms.append(max((need.memory or 0) - fixed, 0) // max(each, 1))
    missing = model.num_experts - sum(rooms)
    largest = max(needs, key=lambda need: need.memory or 0)
    room = rooms[largest.rank]
    if missing <= 0:
        return "Another split of the same memory: --memory with the GB of every rank."
    if room < 1:
        return (
            "More ranks do not help as long as every rank holds the whole dense part: "
            f"with its cache that leaves no room for an expert "
            f"({format_bytes(each)})."
        )
    more = -(-missing // room)
    return (
        f"More ranks: {more} more with {format_bytes(largest.memory or 0)}, "
        f"{len(needs) + more} in all."
    )


def _context(workload: Workload, split_of: SplitOf) -> str:
    """A context that fits every rank while the next step does not, by bisection.

    Experts are shared out for each context anew, as the command would.
    """
    low, high = 0, workload.context // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if split_of(replace(workload, context=middle * _CONTEXT_STEP)).fits:
            low = middle
        else:
            high = middle - 1
    if not low:
        return ""
    return f"A smaller context: {low * _CONTEXT_STEP} tokens fit."


def _tensor(workload: Workload, split_of: SplitOf) -> str:
    try:
        found = split_of(replace(workload, attention="tensor"))
    except ValueError:  # the model cannot be split so, which is no advice
        return ""
    most = max(need.total_bytes for need in found.needs)
    if not found.fits:
        return (
            f"--attention tensor takes less, at most {format_bytes(most)} a rank, and "
            "is not enough by itself."
        )
    return f"--attention tensor fits: at most {format_bytes(most)} a rank."
