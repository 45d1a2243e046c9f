"""Python objects between ranks, as JSON: small things such as a configuration.

A tuple arrives as a list and the keys of a dict as strings, on every rank alike,
the one that sent it included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from mlx_ep.comm.base import Comm
from mlx_ep.types import to_host

Value = TypeVar("Value")

# A problem of one rank is printed by all: a checkpoint's own text in it must not fill
# their screens.
MOST_CHARACTERS = 2000


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


def agreed(comm: Comm, compute: Callable[[], Value]) -> Value:
    """What `compute` gives on this rank, once it has given something on every rank.

    One rank's problem is everybody's error: nobody goes on to a collective that another
    rank will never enter. Every rank must call it, and `compute` must not communicate.

    Args:
        comm: the ranks.
        compute: run once on this rank; what it returns stays on it. It tells of a
            problem by a ValueError.

    Raises:
        ValueError: on every rank, with the same text, if `compute` raised one on any: a
            problem that all ranks have is told once, else each with its rank. A longer
            text than `MOST_CHARACTERS` loses its middle.
    """
    value, problem = None, ""
    try:
        value = compute()
    except ValueError as error:
        problem = shortened(str(error)) or type(error).__name__
    raise_problems(gather_objects(comm, problem))
    return cast(Value, value)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text of at most `most` characters: its middle gives way."""
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _bytes(text: bytes) -> mx.array:
    return mx.array(np.frombuffer(text, dtype=np.uint8))
