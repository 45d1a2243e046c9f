"""What the routers did while requests were served."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ep.comm import Comm
from mlx_ep.moe import RoutingRecorder
from mlx_ep.types import to_host


class ExpertLoads:
    """Counts of the tokens that each expert had; every rank has one, used alike.

    Args:
        own_tokens: whether the ranks have tokens of their own.
    """

    def __init__(self, model: nn.Module, comm: Comm, own_tokens: bool) -> None:
        self._state, self._comm, self._own_tokens = (
            model.expert_parallel, comm, own_tokens,
        )  # fmt: skip
        self._recorder: RoutingRecorder | None = None
        self.ranks: tuple[tuple[float, ...], ...] = ()

    @property
    def is_running(self) -> bool:
        return self._recorder is not None and self._recorder.is_running

    def act(self, action: str) -> dict[str, Any]:
        """Start (anew), stop, or dump; what rank 0 answers."""
        if not self._state.blocks:  # a dense model routes nothing
            return {"recording": False, "tokens": 0, "counts": []}
        if action == "start":
            self._recorder = self._recorder or self._state.recorder()
            self._recorder.reset()
            self._recorder.start()
            self.ranks = ()
            return {"recording": True}
        if self._recorder is None:
            return {"recording": False, "tokens": 0, "counts": []}
        if action == "stop":
            self._recorder.stop()
        counts = self.refresh()
        return {
            "recording": self.is_running,
            "tokens": int(counts[0].sum()) // max(self._recorder.top_k, 1),
            "counts": counts.tolist(),  # on host
            "ranks": self.ranks,
        }

    def refresh(self) -> np.ndarray:
        """Rows that each expert had, ``[layers, E]``, of all ranks' tokens."""
        assert self._recorder is not None
        both = self._recorder.coactivations
        counts = np.diagonal(both, axis1=1, axis2=2)
        if self._state.group.may_be_apart and self._own_tokens:
            # sync: likewise; each rank computes its own tokens, and no others.
            own = mx.array(counts.astype(np.int32))[None]
            of_ranks = to_host(self._comm.all_gather(own))
            self.ranks = tuple(map(tuple, of_ranks.sum(axis=2).T.tolist()))  # on host
            return np.asarray(of_ranks.sum(axis=0))  # on host
        if self._own_tokens and self._comm.size > 1:
            # sync: once in many steps, or where somebody asks.
            counts = to_host(self._comm.all_reduce(mx.array(counts.astype(np.int32))))
        copies = np.zeros(counts.shape[1])
        rank_experts = self._state.group.placement.rank_experts
        for experts in rank_experts:
            copies[list(experts)] += 1
        loads = [(counts / copies)[:, list(e)].sum(axis=1) for e in rank_experts]
        self.ranks = tuple(map(tuple, np.stack(loads, axis=1).tolist()))  # on host
        return counts
