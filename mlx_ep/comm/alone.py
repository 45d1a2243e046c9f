"""One rank of its own, among others that it does not talk to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
from jaxtyping import Shaped

from mlx_ep.comm.capabilities import Transport


class AloneComm:
    """A `Comm` of one rank: every collective returns its input.

    For a model that each rank runs by itself, where `mx.distributed` has a group of all
    ranks only.
    """

    rank = 0
    size = 1
    transport: Transport = "none"

    def all_reduce(self, x: Shaped[mx.array, ...]) -> Shaped[mx.array, ...]:
        """See `Comm.all_reduce`."""
        return x

    def all_gather(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """See `Comm.all_gather`."""
        return x

    def reduce_scatter(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """See `Comm.reduce_scatter`."""
        return x

    def all_to_all(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "n ..."]:
        """See `Comm.all_to_all`."""
        return x

    def all_to_all_v(
        self,
        x: Shaped[mx.array, "n ..."],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
    ) -> Shaped[mx.array, "m ..."]:
        """See `Comm.all_to_all_v`."""
        if list(send_counts) != [len(x)] or list(recv_counts) != [len(x)]:
            raise ValueError(
                f"One rank keeps all {len(x)} rows; got {list(send_counts)} to send "
                f"and {list(recv_counts)} to receive."
            )
        return x

    def broadcast(
        self, x: Shaped[mx.array, "*shape"], root: int = 0
    ) -> Shaped[mx.array, "*shape"]:
        """See `Comm.broadcast`."""
        if root:
            raise ValueError(f"There is rank 0 only; got root {root}.")
        return x

    def beside(self) -> AbstractContextManager[object]:
        """See `Comm.beside`."""
        return nullcontext()

    def barrier(self) -> None:
        """See `Comm.barrier`."""
