"""What each transport of MLX can do, as data.

Everything that depends on the transport looks it up here; nothing tries an
operation to see whether it raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Transport = Literal["none", "ring", "mpi", "jaccl", "jaccl-ring"]

COLLECTIVES = frozenset({"all_sum", "all_max", "all_min", "all_gather"})


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What one transport can do.

    Attributes:
        transport: its name; "none" is a single process.
        operations: the functions of `mx.distributed` that do not raise on it.
        peers: which ranks `send` and `recv` reach: every rank, the two neighbours
            in rank order (around the ring), or none.
        is_fixed_shape: only collectives of one shape may be used; point-to-point
            transfers of different sizes give wrong data there.
        max_ranks: the largest group, None where nothing limits it.
    """

    transport: Transport
    operations: frozenset[str]
    peers: Literal["any", "neighbours", "none"]
    is_fixed_shape: bool = False
    max_ranks: int | None = None


_TABLE = (
    # mlx 0.32.4, a group of one rank: every collective returns its input, send and
    # recv raise.
    Capability(
        transport="none",
        operations=COLLECTIVES | {"sum_scatter"},
        peers="none",
        max_ranks=1,
    ),
    # mlx 0.32.4: "[ring] sum_scatter not supported.", "[ring] Group split not
    # supported.", send and recv raise where the peer is not a neighbour.
    Capability(
        transport="ring",
        operations=COLLECTIVES | {"send", "recv"},
        peers="neighbours",
    ),
    # mlx 0.32.4 with Open MPI 5: "[mpi] sum_scatter not yet implemented."
    Capability(
        transport="mpi",
        operations=COLLECTIVES | {"send", "recv", "split"},
        peers="any",
    ),
    # mlx 0.32.4, the RDMA mesh: split raises, at most 8 peers. Point-to-point
    # transfers of changing size give wrong data or hang (ml-explore/mlx#3149).
    Capability(
        transport="jaccl",
        operations=COLLECTIVES | {"sum_scatter", "send", "recv"},
        peers="any",
        is_fixed_shape=True,
        max_ranks=8,
    ),
    # mlx 0.32.4, JACCL with MLX_JACCL_RING: one cable to each neighbour. Its ring holds
    # connections to two neighbours only, so the mesh's limit of 8 does not apply.
    Capability(
        transport="jaccl-ring",
        operations=COLLECTIVES | {"sum_scatter", "send", "recv"},
        peers="neighbours",
        is_fixed_shape=True,
    ),
)

CAPABILITIES: Mapping[str, Capability] = MappingProxyType(
    {capability.transport: capability for capability in _TABLE}
)


def transport_of_environment(environ: Mapping[str, str]) -> Transport:
    """The transport that a launcher prepared, from the variables it sets.

    `mlx.launch` sets MLX_HOSTFILE for the ring, MLX_IBV_DEVICES for JACCL (and
    MLX_JACCL_RING for its ring); mpirun sets OMPI_COMM_WORLD_SIZE and PMIX_RANK.
    A ring launched under a scheduler that sets PMIX_RANK too is a ring.
    """
    if "MLX_HOSTFILE" in environ:
        return "ring"
    if "MLX_IBV_DEVICES" in environ:
        # MLX takes the variable's presence, whatever its value.
        return "jaccl-ring" if "MLX_JACCL_RING" in environ else "jaccl"
    if "OMPI_COMM_WORLD_SIZE" in environ or "PMIX_RANK" in environ:
        return "mpi"
    return "none"
