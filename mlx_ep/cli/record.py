"""`--record FILE`: the routing of a whole command, written by rank 0 at its end."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ep.comm import Comm
from mlx_ep.placement import RecordedRouting, is_record, write_record
from mlx_ep.types import to_host


def add_record_flag(parser: argparse.ArgumentParser) -> None:
    """--record, for `check_record_name` and `recorded`."""
    parser.add_argument(
        "--record",
        metavar="FILE.npz",
        help="Write how often experts were used, alone and together (and FILE.json): "
        "for --placement, and for the simulator.",
    )


def check_record_name(path: str | None) -> None:
    """Raises:
    ValueError: a record cannot be written there.
    """
    if path is None:
        return
    if not is_record(path):
        raise ValueError(f"--record must name an .npz file; got {path}.")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--record {path}: there is no folder for it.")


@contextmanager
def recorded(path: str | None, model: nn.Module, comm: Comm) -> Iterator[None]:
    """Record what the body routes; every rank enters it. Nothing where path is None."""
    if path is None:
        yield
        return
    state = model.expert_parallel
    recorder = state.recorder()
    recorder.start()
    yield
    recorder.stop()
    record, num_tokens = recorder.record(), recorder.num_tokens
    if state.group.strategy.is_sharded:
        record, num_tokens = _of_all_ranks(record, num_tokens, comm)
    if comm.rank == 0:
        write_record(path, record, num_tokens=num_tokens)


def _of_all_ranks(
    record: RecordedRouting, num_tokens: int, comm: Comm
) -> tuple[RecordedRouting, int]:
    """The sum of the ranks' records, each of its own tokens."""
    flat = np.append(record.coactivations.reshape(-1), num_tokens).astype(np.int32)
    # sync: once, at the end of a command.
    total = to_host(comm.all_reduce(mx.array(flat))).astype(np.int64)
    both = total[:-1].reshape(record.coactivations.shape)
    # sync: likewise.
    top_k = int(to_host(comm.all_gather(mx.array([record.top_k], mx.int32))).max())
    return RecordedRouting(both, top_k), int(total[-1])
