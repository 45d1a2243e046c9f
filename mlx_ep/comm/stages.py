"""What connects the stages of a pipeline, and the ranks inside each."""

from __future__ import annotations

import atexit

import mlx.core as mx
from jaxtyping import Shaped

from mlx_ep.comm.alone import AloneComm
from mlx_ep.comm.base import Comm
from mlx_ep.comm.group import GroupComm


class StageLink:
    """The stage of this rank, of N stages of consecutive ranks.

        stage 0: ranks 0 1   ->   stage 1: ranks 2 3

    A message is queued when it is asked for, in the order of the program: a stage goes
    on to its next chunk of a prompt while the next stage computes this one.

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
        self._members = comm.size // num_stages
        self.count = num_stages
        self.index = comm.rank // self._members
        if self._members == 1:
            self.group: Comm = AloneComm()
            return
        made = comm.group.split(self.index, comm.rank)
        members = GroupComm(made, transport=comm.transport)
        self.group = members
        # MPI ends the job where a group is freed after MPI has finished.
        atexit.register(lambda: delattr(members, "group"))

    def receive(self, like: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """What the same rank of the stage before sends, of the shape of `like`."""
        received = mx.distributed.recv(
            like.shape,
            like.dtype,
            self._comm.rank - self._members,
            group=self._comm.group,
            stream=self._comm._stream(),
        )
        mx.async_eval(received)
        return received

    def send(self, x: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """Send hidden states to the same rank of the next stage; gives them back."""
        sent = mx.distributed.send(
            x,
            self._comm.rank + self._members,
            group=self._comm.group,
            stream=self._comm._stream(),
        )
        mx.async_eval(sent)
        return sent

    def share(self, x: Shaped[mx.array, "*shape"]) -> Shaped[mx.array, "*shape"]:
        """What the last stage has, on all ranks."""
        return self._comm.broadcast(x, self._comm.size - self._members)


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
    if num_stages < comm.size and "split" not in capability.operations:
        raise ValueError(
            f"--pp {num_stages} on {comm.size} ranks needs groups of some of the "
            f"ranks, which MLX has with MPI only; got {comm.transport}. Give --pp "
            f"{comm.size}, start with mlx_ep.launch --backend mpi, or leave --pp out."
        )
