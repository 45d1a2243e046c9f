"""Python objects between ranks, as JSON: small things such as a configuration.

A tuple arrives as a list and the keys of a dict as strings, on every rank alike,
the one that sent it included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ep.comm.base import Comm
from mlx_ep.types import to_host


def gather_objects(comm: Comm, obj: Any) -> list[Any]:
    """The object of every rank, in rank order, on every rank.

    Args:
        obj: anything JSON can hold; of any size on each rank.
    """
    text = json.dumps(obj).encode()
    # sync: the shape of what follows depends on it.
    sizes = to_host(comm.all_gather(mx.array([len(text)], dtype=mx.int32)))
    width = int(sizes.max())
    # sync: the objects are needed on the host.
    gathered = to_host(comm.all_gather(_bytes(text.ljust(width))))
    rows = gathered.reshape(comm.size, width)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def broadcast_object(comm: Comm, obj: Any, root: int = 0) -> Any:
    """The object of rank `root`, on every rank.

    Args:
        obj: anything JSON can hold; used on `root` only.
        root: the rank whose object is taken.
    """
    text = json.dumps(obj).encode() if comm.rank == root else b""
    # sync: the shape of what follows depends on it.
    size = int(to_host(comm.broadcast(mx.array(len(text), dtype=mx.int32), root)))
    # sync: the object is needed on the host.
    received = to_host(comm.broadcast(_bytes(text.ljust(size)), root))
    return json.loads(bytes(received))


def raise_problems(problems: Sequence[str]) -> None:
    """The same ValueError on every rank, if any rank has a problem.

    Args:
        problems: of every rank, in rank order, as every rank knows them; "" is none.
    """
    different = {problem for problem in problems if problem}
    if not different:
        return
    if all(problems) and len(different) == 1:
        raise ValueError(problems[0])
    raise ValueError(
        " ".join(
            f"rank {r}: {problem}" for r, problem in enumerate(problems) if problem
        )
    )


def agree(comm: Comm, problem: str) -> None:
    """Tell all ranks of this rank's problem, or that it has none (""). All must call.

    Raises:
        ValueError: on every rank, with the same text: a rank has a problem.
    """
    raise_problems(gather_objects(comm, problem))


def _bytes(text: bytes) -> mx.array:
    return mx.array(np.frombuffer(text, dtype=np.uint8))
