"""Whether every rank of a server has every expert: then no layer has to wait.

With attention of its own and every expert, a rank answers its requests alone, as many
servers behind one address would. That is the fastest way to serve a model that each
rank can hold, and it takes memory from KV caches. So it is taken where on every rank

    weights + max(KV cache of one whole context, those of its share of the sequences)

fit into what weights and KV caches may take (`--kv-fraction` of the memory).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from mlx_ep.cli.checks import most_tokens
from mlx_ep.comm import Comm, gather_objects, host_id
from mlx_ep.config import EPConfig
from mlx_ep.loading import memory_limit
from mlx_ep.loading.caches import cache_bytes
from mlx_ep.loading.sizes import experts_bytes, held_bytes
from mlx_ep.metrics import format_bytes
from mlx_ep.server.pools import EngineOptions

# Of a sequence, where nobody said how long they get.
TYPICAL_CONTEXT = 2048
SWITCH_OFF = "--replica-memory 0 shares them instead"


@dataclass(frozen=True)
class CopiesRoom:
    """What it takes that every rank has every expert, bytes of one rank.

    Attributes:
        weights: of the whole model.
        copies: of these, experts that another rank has too.
        caches: that have to fit beside them.
        memory: for all of it, of the rank with the least.
    """

    weights: int
    copies: int
    caches: int
    memory: int

    @property
    def fits(self) -> bool:
        return self.weights + self.caches <= self.memory

    def __str__(self) -> str:
        numbers = (
            f"{format_bytes(self.weights)} of weights and {format_bytes(self.caches)} "
            f"of KV caches {'fit' if self.fits else 'do not fit'} the "
            f"{format_bytes(self.memory)} of a rank"
        )
        if not self.fits:
            return (
                f"experts: shared among the ranks, for {numbers} "
                "(--replica-memory all gives every rank all of them)"
            )
        return (
            f"experts: all on every rank, {format_bytes(self.copies)} of copies on "
            f"each; no layer has to exchange anything ({numbers}; {SWITCH_OFF})"
        )


def rank_memory(config: EPConfig, comm: Comm) -> int:
    """Bytes that the rank with the least has; every rank must call it.

    Ranks on one host share what it offers.
    """
    limit = memory_limit(config.memory_limit_gb)
    offers: list[tuple[str, int]] = gather_objects(comm, (host_id(), limit))
    hosts = [host for host, _ in offers]
    is_own = config.memory_limit_gb is not None  # for each rank by itself
    found = [n // (1 if is_own else hosts.count(host)) for host, n in offers]
    return min([*found, *(int(most * 1e9) for most in config.memory or ())])


def copies_room(
    outline: nn.Module, options: EngineOptions, num_ranks: int, memory: int
) -> CopiesRoom:
    """What it takes for this model. Pure.

    Args:
        outline: the model with its shapes; nothing of it is evaluated.
        memory: of the rank that has the least.

    Raises:
        ValueError: the model's caches cannot be sized without running it.
    """
    context = options.context or most_tokens(outline) or TYPICAL_CONTEXT
    sequences = -(-options.max_num_seqs // num_ranks)
    shared = sequences * cache_bytes(outline, min(context, TYPICAL_CONTEXT))
    experts = experts_bytes(outline)
    return CopiesRoom(
        weights=held_bytes(outline),
        copies=experts - experts // num_ranks,
        caches=max(cache_bytes(outline, context), shared),
        memory=int(memory * options.kv_fraction),
    )


def may_copy(config: EPConfig, num_ranks: int) -> bool:
    """Whether it is for the server to give every rank every expert.

    Where nothing else says which rank has which, and no strategy that exchanges rows
    was asked for.
    """
    is_said = config.placement_file or config.ep_size
    is_moved = config.rebalance_every or config.rebalance_below
    may_be_local = config.strategy in ("replicated", "auto", "local")
    return num_ranks > 1 and may_be_local and not (is_said or is_moved)
