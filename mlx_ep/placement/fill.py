"""A placement with as many copies as a budget, or what they gain, allows."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ep.placement.load import LayerLoad
from mlx_ep.placement.placement import Placement
from mlx_ep.placement.replicas import RankRoom, balance, balance_while_it_pays


def with_replicas(
    base: Placement,
    expert_bytes: int,
    load: LayerLoad,
    replica_bytes: int | None,
    free: Sequence[int] | None,
    *,
    is_recorded: bool = False,
) -> Placement:
    """A placement with copies, the same in all layers, for decoding.

    Args:
        base: of whole experts, one of each.
        expert_bytes: of one expert, in all layers together.
        load: of the layers.
        replica_bytes: of copies on each rank; None: what is left of `free`, as long as
            copies pay.
        free: what each rank has for experts and copies; None: no limit.
        is_recorded: the experts of ranks follow the load too, as many as in `base`;
            else they stay.
    """
    assert replica_bytes is not None or free is not None
    held = [base.num_slots(rank) * expert_bytes for rank in range(base.num_ranks)]
    if replica_bytes is None:
        rooms = [RankRoom(num_bytes) for num_bytes in free or ()]
    else:
        most = [n + replica_bytes for n in held]
        rooms = [RankRoom(min(n, m)) for n, m in zip(most, free or most, strict=True)]
    rooms = [RankRoom(max(n, room.num_bytes)) for n, room in zip(held, rooms)]
    ranks = base.rank_experts
    if is_recorded:
        counts = [RankRoom(n) for n in held]
        ranks = balance([load], counts, [expert_bytes]).layers[0]
    if replica_bytes is not None:
        placed, note = balance([load], rooms, [expert_bytes], base=ranks), ""
    else:
        placed, expected = balance_while_it_pays(
            [load], rooms, [expert_bytes], base=ranks
        )
        stopped = len(expected) > 1 and expected[-1] > 0.99 * expected[-2]
        reason = "the next gain is below 1%" if stopped else "the memory is full"
        last = expected[-2] if stopped else expected[-1]
        note = (
            f"the busiest rank reads {last:.2f} experts per token and layer instead of "
            f"{expected[0]:.2f}; {reason}"
        )
    return Placement(placed.layers[0], note=note)
