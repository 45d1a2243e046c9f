"""Join the other ranks: check what the launcher prepared, then connect."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_ep.comm.capabilities import CAPABILITIES, Transport
from mlx_ep.comm.group import GroupComm, transport_of_environment

Backend = Literal["any", "ring", "mpi", "jaccl", "jaccl-ring"]

# The name that `mx.distributed.init` has for each transport.
_MLX_BACKEND = {"ring": "ring", "mpi": "mpi", "jaccl": "jaccl", "jaccl-ring": "jaccl"}


@dataclass(frozen=True)
class Launched:
    """What the environment says about this process.

    Attributes:
        transport: what the launcher prepared; "none" without a launcher.
        rank: this rank, None where only the transport itself knows.
        num_ranks: how many there are, None where only the transport itself knows.
    """

    transport: Transport
    rank: int | None
    num_ranks: int | None


def init(
    backend: Backend = "any",
    num_ranks: int | None = None,
    *,
    timeout: float | int = 60.0,
) -> GroupComm:
    """Connect to the other ranks over the transport that the launcher prepared.

    Without a launcher, or with a launcher of one rank, it is a group of this process
    alone, and no transport is loaded.

    Args:
        backend: the transport asked for; "any" takes what the launcher prepared.
        num_ranks: how many ranks the user asked for; None takes what there are.
        timeout: seconds for all ranks to connect. After that this process prints
            its stack, in `_wait_for_all_ranks_to_start`, and ends with exit code 1.

    Raises:
        ValueError: the environment, `backend` and `num_ranks` do not fit.
        RuntimeError: the transport could not connect.
    """
    launched = check_environment(os.environ, backend, num_ranks)
    if timeout <= 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
    if os.environ.get("MLX_METAL_FAST_SYNCH", "0") not in ("", "0"):
        warnings.warn(
            "MLX_METAL_FAST_SYNCH is set: with several ranks it can hang the GPU "
            "until the Mac restarts. Unset it.",
            stacklevel=2,
        )
    if launched.num_ranks == 1:
        # A backend whose launcher variables are not set gives a group of one. MLX's
        # ring would wait for itself where the hostfile names one host.
        other = "jaccl" if launched.transport == "ring" else "ring"
        group = mx.distributed.init(strict=False, backend=other)
    else:
        group = _wait_for_all_ranks_to_start(_MLX_BACKEND[launched.transport], timeout)
    rank, size = group.rank(), group.size()
    if launched.rank not in (None, rank) or launched.num_ranks not in (None, size):
        raise RuntimeError(
            f"[comm] the launcher started rank {launched.rank} of {launched.num_ranks}"
            f", got rank {rank} of {size} from MLX, which had connected before: call "
            "mlx_ep's init before any mx.distributed.init"
        )
    _check_num_ranks(Launched(launched.transport, rank, size), num_ranks)
    return GroupComm(group, transport=launched.transport if size > 1 else "none")


def check_environment(
    environ: Mapping[str, str], backend: str = "any", num_ranks: int | None = None
) -> Launched:
    """What the environment says about this process, checked before connecting.

    Raises:
        ValueError: as `init`.
    """
    if backend not in ("any", *_MLX_BACKEND):
        raise ValueError(
            f"backend must be one of {['any', *_MLX_BACKEND]}, got {backend!r}"
        )
    if num_ranks is not None and num_ranks < 1:
        raise ValueError(f"the number of ranks must be at least 1, got {num_ranks}")
    transport = transport_of_environment(environ)
    if transport == "none" and "MLX_RANK" in environ:
        raise ValueError(
            "MLX_RANK is set, but neither MLX_HOSTFILE nor MLX_IBV_DEVICES says where "
            "the other ranks are: start with mlx.launch and the backend ring, jaccl, "
            "jaccl-ring or mpi (nccl is not supported), or unset MLX_RANK"
        )
    if backend not in ("any", transport):
        found = "no launcher" if transport == "none" else f"a launcher for {transport}"
        raise ValueError(
            f"backend {backend!r} needs a launcher that prepares it, but {found} "
            f"started this process: start it with {_launch(backend, num_ranks)}, or "
            'take the backend "any"'
        )
    launched = _READERS[transport](environ)
    if launched.num_ranks is not None:
        _check_num_ranks(launched, num_ranks)
    return launched


def _check_num_ranks(launched: Launched, num_ranks: int | None) -> None:
    given = launched.num_ranks
    assert given is not None
    most = CAPABILITIES[launched.transport].max_ranks
    if most is not None and given > most:
        raise ValueError(
            f"{launched.transport} connects at most {most} ranks, got {given}: use "
            "fewer, or the backend ring"
        )
    if num_ranks is not None and num_ranks != given:
        how = (
            "no launcher started this process"
            if launched.transport == "none"
            else f"the launcher for {launched.transport} started {given}"
        )
        raise ValueError(
            f"the number of ranks asked for must be the number started, got "
            f"{num_ranks}, but {how}: start it with {_launch('any', num_ranks)}"
        )


def _read_none(environ: Mapping[str, str]) -> Launched:
    return Launched("none", 0, 1)


def _read_ring(environ: Mapping[str, str]) -> Launched:
    hosts = _read_json(environ, "MLX_HOSTFILE", empty=[["this host"]])
    if not all(isinstance(h, str) for addresses in hosts for h in addresses):
        raise ValueError(
            'MLX_HOSTFILE must hold a list of ["address:port", ...] for each rank, '
            f"got {hosts[0]!r} for rank 0. A hostfile made for mlx.launch goes to "
            "mlx.launch --hostfile, which writes this one"
        )
    return Launched("ring", _read_rank(environ, len(hosts)), len(hosts))


def _read_jaccl(environ: Mapping[str, str]) -> Launched:
    devices = _read_json(environ, "MLX_IBV_DEVICES", empty=None)
    if any(len(row) != len(devices) for row in devices):
        raise ValueError(
            "MLX_IBV_DEVICES must hold as many devices for each rank as there are "
            f"ranks, got {len(devices)} ranks and {[len(r) for r in devices]} devices"
        )
    if len(devices) > 1 and ":" not in environ.get("MLX_JACCL_COORDINATOR", ""):
        raise ValueError(
            "MLX_JACCL_COORDINATOR must be the address:port where rank 0 listens, got "
            f"{environ.get('MLX_JACCL_COORDINATOR')!r}: start with "
            + _launch("jaccl", len(devices))
        )
    rank = _read_rank(environ, len(devices))
    return Launched(transport_of_environment(environ), rank, len(devices))


def _read_mpi(environ: Mapping[str, str]) -> Launched:
    size = environ.get("OMPI_COMM_WORLD_SIZE")
    rank = environ.get("OMPI_COMM_WORLD_RANK")
    return Launched(
        "mpi", None if rank is None else int(rank), None if size is None else int(size)
    )


_READERS = {
    "none": _read_none,
    "ring": _read_ring,
    "jaccl": _read_jaccl,
    "jaccl-ring": _read_jaccl,
    "mpi": _read_mpi,
}


def _read_json(environ: Mapping[str, str], name: str, empty: Any) -> list[Any]:
    """The file that a variable names: a non-empty list of lists, one for each rank."""
    path = environ[name]
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError as error:
        raise ValueError(
            f"{name} must name a file that can be read, got {path!r} "
            f"({error.strerror}): start with mlx.launch, which writes it, or unset it"
        ) from error
    if not text and empty is not None:
        return empty  # what `mlx.launch -n 1` writes
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} must name a file of JSON, got {path!r}, which is not ({error})"
        ) from error
    is_nested = isinstance(content, list) and all(
        isinstance(item, list) and item for item in content
    )
    if not is_nested or not content:
        raise ValueError(
            f"{name} must name a file with a list of one non-empty list for each rank, "
            f"got {text[:80]!r} in {path!r}. A hostfile made for mlx.launch goes to "
            "mlx.launch --hostfile, which writes this one"
        )
    return content


def _read_rank(environ: Mapping[str, str], num_ranks: int) -> int:
    text = environ.get("MLX_RANK", "")
    if not text.isdecimal() or int(text) >= num_ranks:
        raise ValueError(
            f"MLX_RANK must be a rank, 0 to {num_ranks - 1}, got "
            f"{environ.get('MLX_RANK')!r}: start with mlx.launch, which sets it"
        )
    return int(text)


def _launch(backend: str, num_ranks: int | None) -> str:
    option = "" if backend == "any" else f"--backend {backend} "
    return f"mlx.launch {option}-n {num_ranks or 2} -- ..."


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
    of a ring waits for ever: no Python thread or signal handler can end it, the
    watchdog thread of faulthandler, which is C, can.
    """
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
