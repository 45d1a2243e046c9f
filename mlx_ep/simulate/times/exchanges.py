"""Time of what brings tokens to experts on other ranks and back."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ep.config import EPConfig
from mlx_ep.exchange import STRATEGIES, ExchangeShape, layer_traffic
from mlx_ep.simulate.links import Levels, gather_ns, pairs_ns, reduce_ns, scatter_ns
from mlx_ep.simulate.model import ModelSizes
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.types import TokenCounts

# vLLM's default, none at all, and the strategies of this package.
EXCHANGES = ("allgather", "none", "replicated", "gathered", "all_to_all")


def exchange_ns(
    name: str,
    levels: Levels,
    held: Sequence[int],
    num_ranks: int,
    model: ModelSizes,
    settings: EngineSettings,
) -> float:
    """ns of the exchange of one MoE layer.

    ``allgather``: rows and the router's numbers are gathered, sums reduce-scattered;
    the member with most tokens counts, whose devices have an equal part each. The
    package's own strategies have the traffic that they say they have.

    Args:
        levels: of the network, that the P ranks with experts lie on.
        held: tokens of each instance.

    Raises:
        ValueError: there is no such exchange.
    """
    if name == "none":
        return 0.0
    own = num_ranks // len(held)
    chunk = max(max(1, tokens // own) for tokens in held)
    if name == "allgather":
        row = model.width * settings.itemsize
        words = model.num_experts * settings.itemsize
        return gather_ns(levels, chunk * (row + words)) + scatter_ns(
            levels, chunk * row
        )
    if name not in STRATEGIES:
        raise ValueError(
            f"An exchange must be one of {', '.join(EXCHANGES)}; got {name!r}."
        )
    if name == "replicated":
        counts = (sum(held),) * num_ranks
    else:
        counts = tuple(max(1, t // own) for t in held for _ in range(own))
    shape = ExchangeShape(
        tokens=TokenCounts(counts),
        rank=counts.index(max(counts)),
        width=model.width,
        top_k=model.top_k,
        itemsize=settings.itemsize,
        sum_itemsize=4,
        transport="jaccl",
    )
    traffic = layer_traffic(STRATEGIES.create(EPConfig(strategy=name)), shape)
    total = 0.0
    for operation, num_bytes in traffic.collectives:
        if operation == "all_gather":
            total += gather_ns(levels, num_bytes)
        elif operation == "reduce_scatter":
            total += scatter_ns(levels, num_bytes / num_ranks)
        elif operation == "all_reduce":
            total += reduce_ns(levels, num_bytes)
        else:  # all_to_all and its kin: an equal part for each rank
            total += pairs_ns(levels, num_bytes / num_ranks)
    return total
