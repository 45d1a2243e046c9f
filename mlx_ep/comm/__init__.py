"""Communication between ranks.

`init` joins the ranks that a launcher started and gives a `Comm`, whose collectives
the rest of the package uses; nothing else calls `mx.distributed` for them.

The names are imported when they are first used: the process that watches a rank
(`mlx_ep.comm.control`) needs none of them, and no mlx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_ep.comm.base import Comm
    from mlx_ep.comm.capabilities import (
        CAPABILITIES,
        Capability,
        Transport,
        transport_of_environment,
    )
    from mlx_ep.comm.control.limits import Limits
    from mlx_ep.comm.environment import GroupBackend
    from mlx_ep.comm.group import GroupComm, all_to_all, default_cpu_stream
    from mlx_ep.comm.host import host_id
    from mlx_ep.comm.launch import init
    from mlx_ep.comm.liveness import (
        UsageError,
        guard,
        note_decode,
        note_layer,
        note_prefill,
        note_progress,
        note_step,
        on_end,
        rank_0_addresses,
    )
    from mlx_ep.comm.objects import (
        agreed,
        broadcast_object,
        gather_objects,
        raise_problems,
        shortened,
    )
    from mlx_ep.comm.schedules import Schedule, choose_schedule
    from mlx_ep.comm.sealed import (
        Entrance,
        SealedLink,
        link_to_rank_0,
        run_key,
    )

_HOMES = {
    "Entrance": "sealed",
    "SealedLink": "sealed",
    "link_to_rank_0": "sealed",
    "run_key": "sealed",
    "Comm": "base",
    "GroupComm": "group",
    "all_to_all": "group",
    "default_cpu_stream": "group",
    "init": "launch",
    "host_id": "host",
    "GroupBackend": "environment",
    "guard": "liveness",
    "note_decode": "liveness",
    "note_layer": "liveness",
    "note_prefill": "liveness",
    "note_progress": "liveness",
    "note_step": "liveness",
    "on_end": "liveness",
    "rank_0_addresses": "liveness",
    "Limits": "control.limits",
    "UsageError": "liveness",
    "transport_of_environment": "capabilities",
    "CAPABILITIES": "capabilities",
    "Capability": "capabilities",
    "Transport": "capabilities",
    "Schedule": "schedules",
    "choose_schedule": "schedules",
    "broadcast_object": "objects",
    "gather_objects": "objects",
    "agreed": "objects",
    "shortened": "objects",
    "raise_problems": "objects",
}

__all__ = [
    "Comm",
    "GroupComm",
    "all_to_all",
    "default_cpu_stream",
    "init",
    "host_id",
    "GroupBackend",
    "guard",
    "note_decode",
    "note_layer",
    "note_prefill",
    "note_progress",
    "note_step",
    "on_end",
    "Limits",
    "UsageError",
    "transport_of_environment",
    "CAPABILITIES",
    "Capability",
    "Transport",
    "Schedule",
    "choose_schedule",
    "broadcast_object",
    "gather_objects",
    "agreed",
    "raise_problems",
    "shortened",
    "Entrance",
    "SealedLink",
    "rank_0_addresses",
    "link_to_rank_0",
    "run_key",
]


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'mlx_ep.comm' has no attribute {name!r}")
        return getattr(import_module(f"mlx_ep.comm.{_HOMES[name]}"), name)
