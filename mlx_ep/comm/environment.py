"""What a launcher says about this process, checked before connecting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_ep.comm.capabilities import CAPABILITIES, Transport, transport_of_environment

GroupBackend = Literal["any", "ring", "mpi", "jaccl", "jaccl-ring"]

# The name that `mx.distributed.init` has for each transport.
MLX_BACKEND = {"ring": "ring", "mpi": "mpi", "jaccl": "jaccl", "jaccl-ring": "jaccl"}


@dataclass(frozen=True)
class Launched:
    """What the environment says about this process.

    Attributes:
        transport: what the launcher prepared; "none" without a launcher.
        rank: this rank, None where only the transport itself knows.
        num_ranks: how many there are, None where only the transport itself knows.
        hosts: of a ring, ["address:port", ...] of each rank.
    """

    transport: Transport
    rank: int | None
    num_ranks: int | None
    hosts: tuple[tuple[str, ...], ...] = field(default=(), compare=False)


def check_environment(
    environ: Mapping[str, str], backend: str = "any", num_ranks: int | None = None
) -> Launched:
    """What the environment says about this process, checked before connecting.

    Raises:
        ValueError: as `mlx_ep.comm.init`.
    """
    if backend not in ("any", *MLX_BACKEND):
        raise ValueError(
            f"backend must be one of {['any', *MLX_BACKEND]}, got {backend!r}"
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
        check_num_ranks(launched, num_ranks)
    return launched


def check_num_ranks(launched: Launched, num_ranks: int | None) -> None:
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
    rank = _read_rank(environ, len(hosts))
    return Launched("ring", rank, len(hosts), tuple(map(tuple, hosts)))


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
