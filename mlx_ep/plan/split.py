"""The split of a model over ranks that a command line would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mlx_ep.config import EPConfig
from mlx_ep.loading import choose_placement
from mlx_ep.loading.estimate import ModelOutline, RankNeed, Workload, fits, rank_needs
from mlx_ep.placement import Placement


class Split(NamedTuple):
    """A placement, and what the ranks need with it.

    Attributes:
        context: the --context that gives this placement; 0: without it.
    """

    placement: Placement
    needs: list[RankNeed]
    context: int = 0

    @property
    def fits(self) -> bool:
        return fits(self.needs)


# What a workload would be split like.
SplitOf = Callable[[Workload], Split]


def split_of(
    model: ModelOutline,
    config: EPConfig,
    num_ranks: int,
    memory: Sequence[int] | None,
) -> SplitOf:
    """How the flags of `config` split a model, for any workload.

    With --memory, --context takes part in it: a command keeps room for one sequence
    that is not quantized. Where that is more than there is, or less than the workload
    needs, the split without --context is tried too.

    Args:
        memory: bytes that each rank may hold.

    Raises:
        ValueError: (the function) the configuration or the workload is not possible.
    """
    whole = Placement.contiguous(model.num_experts, 1)

    def placed(context: int, must_fit: bool) -> Placement:
        asked = replace(config, context=context)
        return choose_placement(
            asked, model.num_experts, num_ranks, lambda: model.make(whole, 0), must_fit
        )

    def split(workload: Workload) -> Split:
        if memory is None or config.memory is None:
            placement = placed(0, False)
            return Split(placement, rank_needs(model, placement, workload, memory))
        for context in (workload.context, 0):
            try:
                placement = placed(context, True)
            except ValueError:  # it does not fit: another split may
                continue
            needs = rank_needs(model, placement, workload, memory)
            if Split(placement, needs).fits:
                return Split(placement, needs, context)
        placement = placed(workload.context, False)
        needs = rank_needs(model, placement, workload, memory)
        return Split(placement, needs, workload.context)

    return split
