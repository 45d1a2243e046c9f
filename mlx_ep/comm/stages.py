"""What connects the stages of a pipeline, and the ranks inside each."""

from __future__ import annotations

import atexit

import mlx.core as mx
from jaxtyping import Shaped

from mlx_ep.comm.alone import AloneComm
from mlx_ep.comm.base import Comm
from mlx_ep.comm.group import GroupComm
from mlx_ep.comm.line import LineComm, receive_from, send_to


class StageLink:
    """The stage of this rank, of N stages of consecutive ranks.

        stage 0: ranks 0 1   ->   stage 1: ranks 2 3

    A message is queued when it is asked for, in the order of the program: a stage goes
    on to its next chunk of a prompt while the next stage computes this one.

    Where MLX makes a group of some of the ranks (MPI), each rank sends to the same one
    of the next stage. On a ring only neighbours talk: a stage is a line of them, its
    last rank sends to the first one of the next stage, and that passes it on.

    Attributes:
        group: the collectives of the ranks of this stage.
        index: of this rank's stage; `count`: N.
    """

    def __init__(self, comm: Comm, num_stages: int) -> None:
        """Every rank must make one alike.

        Raises:
            ValueError: the transport has no groups of some ranks.
        """
        check_transport(comm, num_stages)
        assert isinstance(comm, GroupComm)
        self._comm = comm
        members = comm.size // num_stages
        self.count = num_stages
        self.index = comm.rank // members
        self._line: LineComm | None = None
        self._step = members  # to the rank that is sent to
        self.group: Comm = AloneComm()
        if members > 1 and "split" in comm.capability.operations:
            made = comm.group.split(self.index, comm.rank)
            split = GroupComm(made, transport=comm.transport)
            self.group = split
            # MPI ends the job where a group is freed after MPI has finished.
            atexit.register(lambda: delattr(split, "group"))
        elif members > 1:
            self._line = LineComm(comm, self.index * members, members)
            self.group, self._step = self._line, 1

    def receive(self, like: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """What the stage before sends, of the shape of `like`."""
        line = self._line
        if line is None or line.rank == 0:
            like = receive_from(self._comm, self._comm.rank - self._step, like)
        return like if line is None else line.broadcast(like)

    def send(self, x: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """Send hidden states to the next stage; gives them back."""
        line = self._line
        if line is not None and line.rank < line.size - 1:
            return x
        return send_to(self._comm, self._comm.rank + self._step, x)

    def share(self, x: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """What the last stage has, on all ranks."""
        return self._comm.broadcast(x, self._comm.size - self._comm.size // self.count)


def check_transport(comm: Comm, num_stages: int) -> None:
    """Raises:
    ValueError: the transport cannot carry so many stages.
    """
    if num_stages == 1:
        return
    if not isinstance(comm, GroupComm):
        raise ValueError(
            f"--pp {num_stages} needs ranks that MLX connects; got {comm.transport}. "
            "Leave --pp out."
        )
    capability = comm.capability
    # Prompts and steps have different lengths.
    if not {"send", "recv"} <= capability.operations or capability.is_fixed_shape:
        raise ValueError(
            f"--pp {num_stages} sends messages of changing size from stage to stage, "
            f"which {comm.transport} does not carry. Start with mlx_ep.launch "
            "--backend mpi, or leave --pp out."
        )
