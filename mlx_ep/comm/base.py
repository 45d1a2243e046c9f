"""What a group of ranks can do together: the protocol `Comm`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import mlx.core as mx
from jaxtyping import Shaped

from mlx_ep.comm.capabilities import Transport


@runtime_checkable
class Comm(Protocol):
    """Collectives of P ranks. Every rank must call the same ones in the same order.

    Arrays may have any dtype unless a method says otherwise, and zero rows. With one
    rank every operation returns its input. An operation that is not evaluated on
    some rank leaves the others waiting for it.
    """

    @property
    def rank(self) -> int:
        """This rank's number, 0 to `size` - 1."""
        ...

    @property
    def size(self) -> int:
        """P, the number of ranks."""
        ...

    @property
    def transport(self) -> Transport:
        """What carries the data; "none" for a single process."""
        ...

    def all_reduce(self, x: Shaped[mx.array, ...]) -> Shaped[mx.array, ...]:
        """Sum `x` over the ranks.

        Args:
            x: of the same shape and dtype on every rank; any dtype but bool.

        Returns:
            The sum, the same on every rank, in the dtype of `x`.

        Raises:
            ValueError: `x` is of bool.
        """
        ...

    def all_gather(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """Concatenate the `x` of all ranks on axis 0, in rank order.

        Args:
            x: [n, ...], of the same shape and dtype on every rank.

        Returns:
            [P*n, ...].
        """
        ...

    def reduce_scatter(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """Sum `x` over the ranks and keep this rank's share of the rows.

        Args:
            x: [P*n, ...], of the same shape and dtype on every rank; not bool.

        Returns:
            [n, ...]: rows rank*n to (rank+1)*n of the sum.

        Raises:
            ValueError: P does not divide the rows, or `x` is of bool.
        """
        ...

    def all_to_all(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "n ..."]:
        """Send chunk j of `x` to rank j and receive a chunk from every rank.

            (to0) (to1) (to2)  this rank's rows  ->  (from0) (from1) (from2)

        Its transpose is itself: gradients flow back the same way.

        Args:
            x: [P*n, ...], of the same shape and dtype on every rank.

        Returns:
            [P*n, ...]: the chunks for this rank, in rank order.

        Raises:
            ValueError: P does not divide the rows.
        """
        ...

    def all_to_all_v(
        self,
        x: Shaped[mx.array, "n ..."],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
    ) -> Shaped[mx.array, "m ..."]:
        """All-to-all with a number of rows of its own for each pair of ranks.

        Gradients flow back the same way, with the counts exchanged.

        Args:
            x: [sum(send_counts), ...], the rows for rank 0 first; of the same
                trailing shape and dtype on every rank.
            send_counts: P ints, how many rows go to each rank.
            recv_counts: P ints, how many rows come from each rank: what that rank
                has in its `send_counts` for this one.

        Returns:
            [sum(recv_counts), ...]: the rows for this rank, those of rank 0 first.

        Raises:
            ValueError: the counts do not fit `x`, the group or one another.
        """
        ...

    def broadcast(
        self, x: Shaped[mx.array, "*shape"], root: int = 0
    ) -> Shaped[mx.array, "*shape"]:
        """The `x` of rank `root` on every rank, bit for bit.

        Args:
            x: of the same shape and dtype on every rank; its value is used on
                `root` only.
            root: the rank whose value is taken.

        Raises:
            ValueError: there is no rank `root`.
        """
        ...

    def beside(self) -> AbstractContextManager[object]:
        """Inside, a CPU host computes on the thread that runs the collectives.

        Small work before and after a collective then needs no other thread to wake up,
        which takes longer than the work. Where MLX computes on a GPU, nothing changes.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank is here. A host sync."""
        ...
