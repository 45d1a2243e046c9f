"""A placement with as many copies as a budget, or what they gain, allows."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ep.placement.load import LayerLoad
from mlx_ep.placement.placement import Placement
from mlx_ep.placement.replicas import (
    Balanced,
    RankRoom,
    balance,
    balance_while_it_pays,
)


def with_replicas(
    base: Placement,
    expert_bytes: Sequence[int],
    loads: Sequence[LayerLoad],
    replica_bytes: int | None,
    free: Sequence[int] | None,
    *,
    whole_load: LayerLoad | None = None,
) -> Placement:
    """A placement with copies, for decoding.

    With one load copies are the same in all layers; with one for each, a layer gets
    the more copies the more they take from its busiest rank.

    Args:
        base: of whole experts, one of each.
        expert_bytes: of one expert, for each of `loads`.
        loads: one of all layers, or one of each.
        replica_bytes: of copies on each rank; None: what is left of `free`, as long as
            copies pay.
        free: what each rank has for experts and copies; None: no limit.
        whole_load: recorded, of all layers as one: the experts of ranks follow it, the
            same in all layers and as many as in `base`. None: they stay.
    """
    assert replica_bytes is not None or free is not None
    all_layers = sum(expert_bytes)
    held = [base.num_slots(rank) * all_layers for rank in range(base.num_ranks)]
    if replica_bytes is None:
        rooms = [RankRoom(num_bytes) for num_bytes in free or ()]
    else:
        most = [n + replica_bytes for n in held]
        rooms = [RankRoom(min(n, m)) for n, m in zip(most, free or most, strict=True)]
    rooms = [RankRoom(max(n, room.num_bytes)) for n, room in zip(held, rooms)]
    ranks = base.rank_experts
    if whole_load is not None:
        counts = [RankRoom(n) for n in held]
        ranks = balance([whole_load], counts, [all_layers]).layers[0]
    if replica_bytes is not None:
        placed, note = balance(loads, rooms, expert_bytes, base=ranks), ""
    else:
        placed, expected = balance_while_it_pays(loads, rooms, expert_bytes, base=ranks)
        stopped = len(expected) > 1 and expected[-1] > 0.99 * expected[-2]
        reason = "the next gain is below 1%" if stopped else "the memory is full"
        last = expected[-2] if stopped else expected[-1]
        note = (
            f"the busiest rank reads {last:.2f} experts per token and layer instead of "
            f"{expected[0]:.2f}; {reason}"
        )
    return _of_layers(placed, Placement(ranks), note)


def _of_layers(placed: Balanced, base: Placement, note: str) -> Placement:
    if len(set(placed.layers)) == 1:
        return Placement(placed.layers[0], note=note)
    # In the slots of `base`, which a checkpoint is read by; copies come behind them.
    layers = [
        Placement(
            tuple(
                (*first, *sorted(set(experts) - set(first)))
                for first, experts in zip(base.rank_experts, ranks, strict=True)
            )
        )
        for ranks in placed.layers
    ]
    return Placement(base.rank_experts, note=note, layers=tuple(layers))
