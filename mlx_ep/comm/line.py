"""A group of some consecutive ranks of a ring, by messages between neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import mlx.core as mx
from jaxtyping import Shaped

from mlx_ep.comm.capabilities import Transport
from mlx_ep.comm.group import GroupComm, check_summable


class LineComm:
    """A `Comm` of the ranks ``first..first+size-1``, where MLX makes no group of them.

    What is summed or gathered goes up the line and comes back down:

        rank 0  a        ->  rank 1  a + b      ->  rank 2  a + b + c
        rank 0  a+b+c    <-  rank 1  a + b + c  <-

    A message is queued when it is asked for, in the order of the program: nothing else
    orders a receive, which has no input. So operations are started at once, also
    where their result is never used, and cannot stand inside `mx.compile`. Each is 2 (P
    - 1) messages, one after another; every rank has the sum that the last one made, the
    same to the last bit.

    It has no `reduce_scatter` and no all-to-all.

    Args:
        comm: of all ranks, over a transport with `send` and `recv` between neighbours.
        first: the first of the ranks; this one must be among them.
        size: P.
    """

    def __init__(self, comm: GroupComm, first: int, size: int) -> None:
        assert first <= comm.rank < first + size <= comm.size
        self._comm, self._first, self._size = comm, first, size

    @property
    def rank(self) -> int:
        """See `Comm.rank`: among these ranks."""
        return self._comm.rank - self._first

    @property
    def size(self) -> int:
        """See `Comm.size`."""
        return self._size

    @property
    def transport(self) -> Transport:
        """See `Comm.transport`."""
        return self._comm.transport

    def all_reduce(self, x: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """See `Comm.all_reduce`."""
        check_summable(x)
        total = x
        if self.rank > 0:
            # On the thread of the messages: it has what came, and nothing else waits.
            before = self._from(-1, x)
            total = mx.add(before, x, stream=self._comm._stream())
        if self.rank < self._size - 1:
            self._to(1, total)
            total = self._from(1, total)
        if self.rank > 0:
            self._to(-1, total)
        return total

    def all_gather(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """See `Comm.all_gather`.

        (r0)  ->  (r0) (r1)  ->  (r0) (r1) (r2)
        """
        x = x[None] if x.ndim == 0 else x
        chunks = [x]
        if self.rank > 0:
            shape = (self.rank * x.shape[0], *x.shape[1:])
            chunks.insert(0, self._from(-1, mx.zeros(shape, x.dtype)))
        gathered = mx.concatenate(chunks, stream=self._comm._stream())
        if self.rank < self._size - 1:
            self._to(1, gathered)
            shape = (self._size * x.shape[0], *x.shape[1:])
            gathered = self._from(1, mx.zeros(shape, x.dtype))
        if self.rank > 0:
            self._to(-1, gathered)
        return gathered

    def reduce_scatter(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """Not there."""
        self._refuse("reduce_scatter")

    def all_to_all(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "n ..."]:
        """Not there."""
        self._refuse("all_to_all")

    def all_to_all_v(
        self,
        x: Shaped[mx.array, "n ..."],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
    ) -> Shaped[mx.array, "m ..."]:
        """Not there."""
        self._refuse("all_to_all_v")

    def broadcast(
        self, x: Shaped[mx.array, "*shape"], root: int = 0
    ) -> Shaped[mx.array, "*shape"]:
        """See `Comm.broadcast`."""
        if not 0 <= root < self._size:
            raise ValueError(f"root must be a rank, 0 to {self._size - 1}, got {root}")
        if self.rank != root:
            x = self._from(1 if self.rank < root else -1, x)
        if 0 < self.rank <= root:
            self._to(-1, x)
        if root <= self.rank < self._size - 1:
            self._to(1, x)
        return x

    def beside(self) -> AbstractContextManager[object]:
        """See `Comm.beside`."""
        return self._comm.beside()

    def barrier(self) -> None:
        """See `Comm.barrier`."""
        # sync: a barrier is one; the sum is complete when all ranks have joined it.
        mx.eval(self.all_reduce(mx.array(0)))

    def _to(self, step: int, x: mx.array) -> None:
        send_to(self._comm, self._comm.rank + step, x)

    def _from(self, step: int, like: mx.array) -> mx.array:
        return receive_from(self._comm, self._comm.rank + step, like)

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"[comm] ranks of a stage over {self.transport} have no {name}: they sum, "
            "gather and broadcast by messages between neighbours."
        )


def send_to(
    comm: GroupComm, peer: int, x: Shaped[mx.array, "*shape"]
) -> Shaped[mx.array, "*shape"]:
    """Send to a rank, behind all that was queued before; gives `x` back."""
    if not x.size:  # both sides know it, and neither waits
        return x
    stream = comm._stream()
    sent = mx.distributed.send(x, peer, group=comm.group, stream=stream)
    mx.async_eval(sent)
    return sent


def receive_from(
    comm: GroupComm, peer: int, like: Shaped[mx.array, "*shape"]
) -> Shaped[mx.array, "*shape"]:
    """What a rank sends, of the shape and dtype of `like`, which is not looked at."""
    if not like.size:
        return like
    received = mx.distributed.recv_like(
        like, peer, group=comm.group, stream=comm._stream()
    )
    mx.async_eval(received)
    return received
