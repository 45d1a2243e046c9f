"""A `Comm` that counts what goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import mlx.core as mx
from jaxtyping import Shaped

from mlx_ep.comm import Comm, Transport
from mlx_ep.metrics import Counters


class CountedComm:
    """Passes every call on to `comm` and counts the bytes of its argument."""

    def __init__(self, comm: Comm, counters: Counters) -> None:
        self.comm = comm
        self.counters = counters
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.transport: Transport = comm.transport

    def record(self, operation: str, x: mx.array) -> None:
        """Called before each collective, with its name in `Comm` and its argument."""
        self.counters.count_collective(x.nbytes)

    def all_reduce(self, x: Shaped[mx.array, ...]) -> Shaped[mx.array, ...]:
        """See `Comm.all_reduce`."""
        self.record("all_reduce", x)
        return self.comm.all_reduce(x)

    def all_gather(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """See `Comm.all_gather`."""
        self.record("all_gather", x)
        return self.comm.all_gather(x)

    def reduce_scatter(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """See `Comm.reduce_scatter`."""
        self.record("reduce_scatter", x)
        return self.comm.reduce_scatter(x)

    def all_to_all(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "n ..."]:
        """See `Comm.all_to_all`."""
        self.record("all_to_all", x)
        return self.comm.all_to_all(x)

    def all_to_all_v(
        self,
        x: Shaped[mx.array, "n ..."],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
    ) -> Shaped[mx.array, "m ..."]:
        """See `Comm.all_to_all_v`."""
        self.record("all_to_all_v", x)
        return self.comm.all_to_all_v(x, send_counts, recv_counts)

    def broadcast(
        self, x: Shaped[mx.array, "*shape"], root: int = 0
    ) -> Shaped[mx.array, "*shape"]:
        """See `Comm.broadcast`."""
        self.record("broadcast", x)
        return self.comm.broadcast(x, root)

    def beside(self) -> AbstractContextManager[object]:
        """See `Comm.beside`."""
        return self.comm.beside()

    def barrier(self) -> None:
        """See `Comm.barrier`."""
        self.comm.barrier()
