"""`Comm` over an `mx.distributed.Group`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import mlx.core as mx
from jaxtyping import Shaped

from mlx_ep.comm.capabilities import (
    CAPABILITIES,
    Transport,
    transport_of_environment,
)
from mlx_ep.comm.rows import split, take, take_padded
from mlx_ep.comm.schedules import Schedule, choose_schedule
from mlx_ep.types import to_host

# Integers as wide as each dtype: moving bits through a sum keeps -0.0 and NaN.
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
# Rows of each chunk: counts[origin][target].
_Counts = Sequence[Sequence[int]]


@cache
def communication_stream() -> mx.ThreadLocalStream:
    """The one CPU stream on which this thread's collectives run.

    MLX runs each stream on a thread of its own, and a collective without a stream runs
    on the default one, which mlx-lm changes while it generates. Two collectives on two
    streams then share the sockets at once and take each other's bytes.
    """
    return mx.new_thread_local_stream(mx.cpu)


def default_cpu_stream() -> mx.Device:
    """The CPU stream that is the default where a collective is built.

    MLX runs a collective without a stream there, whatever the default device is. So
    this is the one stream for a model inside a program with collectives of its own,
    such as mlx-lm's server: those and ours then run one after another, in the order in
    which the program evaluates them, on all ranks alike.
    """
    return mx.Device(mx.cpu, 0)


class GroupComm:
    """The collectives of `Comm` over a group of `mx.distributed`.

    On transports where an all-to-all is a schedule of sends and receives, those are
    evaluated one by one: `all_to_all` is then not lazy and cannot stand inside
    `mx.compile`.

    Args:
        group: the ranks; None takes the global group of MLX.
        transport: what carries the data. None reads it from the environment, as
            the launcher left it.
        schedule: of the all-to-all; None takes what `choose_schedule` says.
        stream: what gives the stream of a collective; `default_cpu_stream` where other
            code has collectives over the same ranks too.
    """

    def __init__(
        self,
        group: mx.distributed.Group | None = None,
        *,
        transport: Transport | None = None,
        schedule: Schedule | None = None,
        stream: Callable[[], mx.ThreadLocalStream | mx.Device] = communication_stream,
    ) -> None:
        self.group = group or mx.distributed.init()
        self._stream = stream
        self._rank = self.group.rank()
        self._size = self.group.size()
        if transport is None:
            found = transport_of_environment(os.environ)
            transport = found if self._size > 1 else "none"
        self.capability = CAPABILITIES[transport]
        self.schedule = schedule or choose_schedule(self.capability, self._size)
        if self.schedule.num_ranks != self._size:
            raise ValueError(
                f"the schedule must be for the {self._size} ranks of the group, got "
                f"one for {self.schedule.num_ranks}"
            )

    @property
    def rank(self) -> int:
        """See `Comm.rank`."""
        return self._rank

    @property
    def size(self) -> int:
        """See `Comm.size`."""
        return self._size

    @property
    def transport(self) -> Transport:
        """See `Comm.transport`."""
        return self.capability.transport

    def all_reduce(self, x: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """See `Comm.all_reduce`."""
        check_summable(x)
        return mx.distributed.all_sum(x, group=self.group, stream=self._stream())

    def all_gather(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """See `Comm.all_gather`."""
        return mx.distributed.all_gather(x, group=self.group, stream=self._stream())

    def reduce_scatter(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "m ..."]:
        """See `Comm.reduce_scatter`."""
        rows = self._rows_per_rank(x)
        check_summable(x)
        if "sum_scatter" in self.capability.operations:
            return mx.distributed.sum_scatter(
                x, group=self.group, stream=self._stream()
            )
        total = mx.distributed.all_sum(x, group=self.group, stream=self._stream())
        return total[self._rank * rows : (self._rank + 1) * rows]

    def all_to_all(self, x: Shaped[mx.array, "n ..."]) -> Shaped[mx.array, "n ..."]:
        """See `Comm.all_to_all`."""
        rows = self._rows_per_rank(x)

        def exchange(x: mx.array) -> mx.array:
            return self._all_to_all(x, rows)

        return _with_transpose(exchange, exchange, x)

    def all_to_all_v(
        self,
        x: Shaped[mx.array, "n ..."],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
    ) -> Shaped[mx.array, "m ..."]:
        """See `Comm.all_to_all_v`."""
        self._check_counts(x, send_counts, recv_counts)

        def forward(x: mx.array) -> mx.array:
            return self._all_to_all_v(x, send_counts, recv_counts)

        def backward(cotangent: mx.array) -> mx.array:
            return self._all_to_all_v(cotangent, recv_counts, send_counts)

        return _with_transpose(forward, backward, x)

    def broadcast(
        self, x: Shaped[mx.array, "*shape"], root: int = 0
    ) -> Shaped[mx.array, "*shape"]:
        """See `Comm.broadcast`."""
        if not 0 <= root < self._size:
            raise ValueError(f"root must be a rank, 0 to {self._size - 1}, got {root}")
        is_bool = x.dtype == mx.bool_
        bits = x.astype(mx.uint8) if is_bool else x.view(_UNSIGNED[x.dtype.size])
        # A product and not zeros on the other ranks: what `x` depends on may hold
        # collectives, and those have to run on every rank.
        bits = bits * mx.array(self._rank == root, dtype=bits.dtype)
        bits = mx.distributed.all_sum(bits, group=self.group, stream=self._stream())
        return bits.astype(mx.bool_) if is_bool else bits.view(x.dtype)

    def beside(self) -> AbstractContextManager[object]:
        """See `Comm.beside`."""
        if mx.default_device() == mx.gpu:
            return nullcontext()
        context: AbstractContextManager[object] = mx.stream(self._stream())
        return context

    def barrier(self) -> None:
        """See `Comm.barrier`."""
        # sync: a barrier is one; the sum is complete when all ranks have joined it.
        mx.eval(
            mx.distributed.all_sum(mx.array(0), group=self.group, stream=self._stream())
        )

    def _all_to_all(self, x: mx.array, rows: int) -> mx.array:
        size, rank = self._size, self._rank
        if not self.schedule.is_collective:
            return self._point_to_point(x, [[rows] * size] * size)
        chunks = x.reshape(size, rows, *x.shape[1:])
        if self.schedule.kind == "exchange":
            peer = mx.distributed.all_gather(
                chunks[1 - rank], group=self.group, stream=self._stream()
            )
            # A choice instead of a concatenation: MLX runs collectives in an order
            # that follows from the graph, so the graph must be alike on all ranks.
            is_own = (mx.arange(size) == rank).reshape(size, *[1] * x.ndim)
            return mx.where(is_own, chunks, peer.reshape(chunks.shape)).reshape(x.shape)
        # (from0: to0 to1) (from1: to0 to1)  ->  (from0: to1) (from1: to1)
        gathered = mx.distributed.all_gather(
            chunks, group=self.group, stream=self._stream()
        )
        return gathered.reshape(size, *chunks.shape)[:, rank].reshape(x.shape)

    def _all_to_all_v(
        self, x: mx.array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> mx.array:
        if self._size == 1:
            return x  # nothing to agree on: no host sync
        if not self.schedule.is_collective:
            return self._point_to_point(x, self._all_counts(send_counts, recv_counts))
        if self.schedule.kind == "exchange":
            return self._exchange_v(x, send_counts, recv_counts)
        return self._padded_v(x, send_counts, recv_counts)

    def _all_counts(
        self, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> _Counts:
        """counts[origin][target], as far as the schedule needs it."""
        if self.schedule.kind == "relay":
            # A rank that passes chunks on has to know their sizes.
            gathered = self.all_gather(mx.array(list(send_counts), dtype=mx.int32))
            # sync: the shapes of the messages depend on it.
            return to_host(gathered).reshape(self._size, self._size).tolist()
        counts = [[0] * self._size for _ in range(self._size)]
        for peer in range(self._size):
            counts[peer][self._rank] = recv_counts[peer]
        counts[self._rank] = list(send_counts)
        return counts

    def _exchange_v(
        self, x: mx.array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> mx.array:
        """Two ranks: all_gather what each has for the other.

        Both are padded to the larger count, which both ranks know, and to one row at
        least: nobody has tried a collective of nothing on JACCL. Exact sends and
        receives would put as many rows on the busier direction of the cable, and
        use one direction after the other (a blocking send, then a receive), with a
        host sync for each: never less time for the rows, and often twice as much.
        """
        peer = 1 - self._rank
        widest = max(1, send_counts[peer], recv_counts[peer])
        starts = [0, send_counts[0]]
        sent = take_padded(x, [starts[peer]], [send_counts[peer]], widest)
        gathered = mx.distributed.all_gather(
            sent, group=self.group, stream=self._stream()
        )
        starts[peer] = x.shape[0] + peer * widest
        return take(mx.concatenate([x, gathered]), starts, recv_counts)

    def _padded_v(
        self, x: mx.array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> mx.array:
        """Every chunk padded to the largest of all, for transports of one shape.

        (to0) (to1)  ->  (to0 ..) (to1 .)  ->  (from0 ..) (from1 .)  ->  (from0) (from1)
        """
        # At least one row, as in `_exchange_v`.
        largest = mx.array(max(1, *send_counts), dtype=mx.int32)
        largest = mx.distributed.all_max(
            largest, group=self.group, stream=self._stream()
        )
        # sync: the shape of the collective depends on it.
        widest = int(to_host(largest))
        starts = [sum(send_counts[:peer]) for peer in range(self._size)]
        padded = take_padded(x, starts, send_counts, widest)
        received = self._all_to_all(padded, widest)
        starts = [peer * widest for peer in range(self._size)]
        return take(received, starts, recv_counts)

    def _point_to_point(self, x: mx.array, counts: _Counts) -> mx.array:
        """Run the schedule's sends and receives.

        `recv` has no input, so a lazy graph cannot order it after a `send`: two ranks
        that evaluate several of them together can wait for each other for ever.
        Hence one evaluation for each, in the order of the schedule.
        """
        # sync: what `x` depends on may hold collectives, which have to be done on
        # all ranks before some of them wait in a receive.
        mx.eval(x)
        splits = split(x, counts[self._rank])
        held = {(self._rank, target): chunk for target, chunk in enumerate(splits)}
        for message in self.schedule.messages(self._rank):
            sizes = [counts[origin][target] for origin, target in message.chunks]
            # Nothing to say: both sides know it, and neither waits.
            if message.is_send:
                parts = [held.pop(chunk) for chunk in message.chunks]
                if sum(sizes):
                    rows = mx.concatenate(parts)
                    # sync: see above.
                    mx.eval(
                        mx.distributed.send(
                            rows,
                            message.peer,
                            group=self.group,
                            stream=self._stream(),
                        )
                    )
                continue
            shape = (sum(sizes), *x.shape[1:])
            rows = mx.zeros(shape, dtype=x.dtype)
            if sum(sizes):
                rows = mx.distributed.recv(
                    shape,
                    x.dtype,
                    message.peer,
                    group=self.group,
                    stream=self._stream(),
                )
                # sync: see above.
                mx.eval(rows)
            held |= dict(zip(message.chunks, split(rows, sizes)))
        return mx.concatenate([held[peer, self._rank] for peer in range(self._size)])

    def _rows_per_rank(self, x: mx.array) -> int:
        if x.shape[0] % self._size:
            raise ValueError(
                "The first dimension (axis 0) must be divisible by the group size: "
                f"got {x.shape[0]} rows and {self._size} ranks"
            )
        return x.shape[0] // self._size

    def _check_counts(
        self, x: mx.array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> None:
        for name, counts in (
            ("send_counts", send_counts),
            ("recv_counts", recv_counts),
        ):
            if len(counts) != self._size or min(counts) < 0:
                raise ValueError(
                    f"{name} must hold {self._size} numbers of rows, one for each "
                    f"rank and none negative, got {list(counts)}"
                )
        if sum(send_counts) != x.shape[0]:
            raise ValueError(
                f"send_counts must add up to the {x.shape[0]} rows given, got "
                f"{list(send_counts)} = {sum(send_counts)}"
            )
        sent, received = send_counts[self._rank], recv_counts[self._rank]
        if sent != received:
            raise ValueError(
                f"rank {self._rank} sends itself what it receives from itself, got "
                f"{sent} rows in send_counts and {received} in recv_counts"
            )


def _with_transpose(
    forward: Callable[[mx.array], mx.array],
    transpose: Callable[[mx.array], mx.array],
    x: mx.array,
) -> mx.array:
    """`forward(x)`, whose gradient is `transpose` of the output's gradient."""
    function = mx.custom_function(forward)
    function.vjp(lambda primal, cotangent, output: transpose(cotangent))
    result: Any = function(x)
    return result


def check_summable(x: mx.array) -> None:
    """Raises:
    ValueError: a sum of these is not the same on every transport.
    """
    # MPI ends the whole job on a sum of bool, the ring gives a logical or.
    if x.dtype == mx.bool_:
        raise ValueError("a sum needs numbers, got dtype bool: cast it first")


def all_to_all(
    x: Shaped[mx.array, "n ..."], *, group: mx.distributed.Group | None = None
) -> Shaped[mx.array, "n ..."]:
    """Send chunk j of `x` to rank j and receive a chunk from every rank.

    Args:
        x: ``[P*n, ...]``, of the same shape and dtype on every rank.
        group: the ranks; default: ``mx.distributed.init()``.

    Returns:
        ``[P*n, ...]``: the chunks for this rank, in rank order. Its gradient is an
        all-to-all of the cotangent.

    Raises:
        ValueError: P does not divide the rows.
    """
    return GroupComm(group).all_to_all(x)
