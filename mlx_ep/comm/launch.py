"""Join the other ranks: check what the launcher prepared, then connect."""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx

from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.environment import (
    MLX_BACKEND,
    GroupBackend,
    Launched,
    check_environment,
    check_num_ranks,
)
from mlx_ep.comm.group import GroupComm
from mlx_ep.comm.liveness import Liveness, start_early

BACKSTOP = 5.0  # seconds after the time limit, should the watch have gone


def init(
    backend: GroupBackend = "any",
    num_ranks: int | None = None,
    *,
    timeout: float | int | None = None,
) -> GroupComm:
    """Connect to the other ranks over the transport that the launcher prepared.

    Without a launcher, or with a launcher of one rank, it is a group of this process
    alone, and no transport is loaded. With several ranks the control channel starts
    first (`mlx_ep.comm.control`), so that a rank that fails in here ends the others.

    Args:
        backend: the transport asked for; "any" takes what the launcher prepared.
        num_ranks: how many ranks the user asked for; None takes what there are.
        timeout: seconds for all ranks to connect, by default `Limits.starting`. After
            that all ranks end, with their stacks, in `_wait_for_all_ranks_to_start`.

    Raises:
        ValueError: the environment, `backend` and `num_ranks` do not fit.
        RuntimeError: the transport could not connect.
    """
    launched = check_environment(os.environ, backend, num_ranks)
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
    limits = Limits().changed_by(os.environ)
    if timeout is not None:
        limits = replace(limits, starting=float(timeout))
    if os.environ.get("MLX_METAL_FAST_SYNCH", "0") not in ("", "0"):
        warnings.warn(
            "MLX_METAL_FAST_SYNCH is set: with several ranks it can hang the GPU "
            "until the Mac restarts. Unset it.",
            stacklevel=2,
        )
    channel = start_early(launched, limits)
    if channel is not None:
        channel.wait_ready()
    if launched.num_ranks == 1:
        # A backend whose launcher variables are not set gives a group of one. MLX's
        # ring would wait for itself where the hostfile names one host.
        other = "jaccl" if launched.transport == "ring" else "ring"
        group = mx.distributed.init(strict=False, backend=other)
    else:
        backstop = limits.starting + BACKSTOP
        group = _wait_for_all_ranks_to_start(MLX_BACKEND[launched.transport], backstop)
    rank, size = group.rank(), group.size()
    if launched.rank not in (None, rank) or launched.num_ranks not in (None, size):
        raise RuntimeError(
            f"[comm] the launcher started rank {launched.rank} of {launched.num_ranks}"
            f", got rank {rank} of {size} from MLX, which had connected before: call "
            "mlx_ep's init before any mx.distributed.init"
        )
    check_num_ranks(Launched(launched.transport, rank, size), num_ranks)
    comm = GroupComm(group, transport=launched.transport if size > 1 else "none")
    if channel is not None:
        comm.barrier()  # an end of any rank before all are here is still one of all
        channel.group_exists(group)
    return comm


def start_channel() -> Liveness | None:
    """The control channel of the ranks that a launcher started, before any connects.

    `init` starts it too; a command calls this first of all, so that the others hear of
    whatever goes wrong before. None without a launcher.

    Raises:
        ValueError: the environment does not fit.
    """
    return start_early(check_environment(os.environ))


def _wait_for_all_ranks_to_start(backend: str, timeout: float) -> mx.distributed.Group:
    """Connect; the name of this function is what a user reads in the stack."""
    with _time_limit(timeout):
        try:
            return mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            raise RuntimeError(
                f"[comm] could not connect over {backend}: {error}. Every rank has to "
                "be started, on hosts that reach each other"
            ) from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End the process where the body takes longer.

    MLX holds the GIL while it connects (measured: no other thread runs), and rank 0
    of a ring waits for ever. The watch ends it; where there is none (the rank's number
    is not known before), the watchdog thread of faulthandler, which is C, does.
    """
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
