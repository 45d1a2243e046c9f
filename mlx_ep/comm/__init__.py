"""Communication between ranks.

`init` joins the ranks that a launcher started and gives a `Comm`, whose collectives
the rest of the package uses; nothing else calls `mx.distributed` for them.
"""

from mlx_ep.comm.base import Comm
from mlx_ep.comm.capabilities import CAPABILITIES, Capability, Transport
from mlx_ep.comm.group import (
    GroupComm,
    all_to_all,
    default_cpu_stream,
    transport_of_environment,
)
from mlx_ep.comm.launch import Backend, init
from mlx_ep.comm.objects import (
    agreed,
    broadcast_object,
    gather_objects,
    raise_problems,
    shortened,
)
from mlx_ep.comm.schedules import Schedule, choose_schedule

__all__ = [
    "Comm",
    "GroupComm",
    "all_to_all",
    "default_cpu_stream",
    "init",
    "Backend",
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
]
