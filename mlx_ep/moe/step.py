"""What holds for one forward pass of all layers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_ep.comm import Comm
from mlx_ep.rows import limit_to_capacity
from mlx_ep.types import Routing, TokenCounts, to_host


@dataclass
class Step:
    """What holds for one step (one forward pass) of all layers.

    Attributes:
        tokens: T of every rank, where the caller has agreed on it.
        dropped_pairs: (token, expert) pairs of this rank beyond the capacity, so far.
        layer: the number in the model of the layer that is being called; -1: none.
        calls: layers of the model that were called so far, this one included.
        number: of the pass, from 0 on.
        is_shared: ranks that could each compute their own tokens, since they have
            every expert, share the work of this pass instead; alike on all ranks.
    """

    tokens: TokenCounts | None = None
    dropped_pairs: int = 0
    layer: int = -1
    calls: int = 0
    number: int = -1
    is_shared: bool = False

    def enter(self, layer: int) -> None:
        """The layer of this number is called; a lower one than before begins anew."""
        if self.layer < 0 or layer <= self.layer:
            self.number += 1
        self.calls = self.calls + 1 if layer >= self.layer else 1
        self.layer = layer

    def limited(self, routing: Routing, capacity: int, rank: int) -> Routing:
        """The routing of `rank` with no more pairs of an expert than `capacity`.

        What is dropped is counted, and warned of once.
        """
        # sync: which pairs are dropped is counted here and has to be reported.
        ids = to_host(routing.expert_ids).astype(np.int32, copy=False)
        ids, dropped = limit_to_capacity(ids, capacity)
        if dropped and not self.dropped_pairs:
            warnings.warn(
                f"rank {rank} drops {dropped} of {ids.size} (token, expert) "
                f"pairs beyond capacity={capacity}; this is said once, "
                "ExpertGroup.step.dropped_pairs has the count.",
                stacklevel=3,
            )
        self.dropped_pairs += dropped
        return Routing(mx.array(ids), routing.gates)


def rank_0_routing(routing: Routing, comm: Comm) -> Routing:
    """Rank 0's routing of the same tokens, where ranks may have rounded differently."""
    # Ids are below 2^24, which float32 holds exactly: one collective for both.
    ids = routing.expert_ids.astype(mx.float32)
    both = comm.broadcast(mx.stack([ids, routing.gates]))
    return routing._replace(expert_ids=both[0].astype(mx.int32), gates=both[1])
