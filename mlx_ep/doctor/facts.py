"""What a rank runs on, in facts that JSON can hold, and how they differ."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import psutil

from mlx_ep.comm import Comm, host_id
from mlx_ep.comm.symmetry import differences
from mlx_ep.loading import memory_limit
from mlx_ep.rows import uses_metal

# What a launcher or a user may have set, and what it does.
RISKY_VARIABLES = {
    "MLX_METAL_FAST_SYNCH": "with several ranks it can hang the GPU until the Mac "
    "restarts; unset it",
    "MLX_EP_BACKEND": "it forces what runs the experts",
}
# Of the launcher: they differ from rank to rank, or nobody may see them.
_OF_THE_LAUNCHER = {
    "MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR",
    "MLX_EP_SECRET", "MLX_MPI_LIBNAME", "MLX_EP_BARS",
}  # fmt: skip
# Of a rank: what `machine` gives.
MachineFacts = Mapping[str, Any]


def machine(comm: Comm) -> dict[str, Any]:
    """What this rank runs on; bytes, and a load in running processes."""
    device = mx.device_info()
    memory = psutil.virtual_memory()
    return {
        "rank": comm.rank,
        "size": comm.size,
        "host": socket.gethostname(),
        "host_id": host_id(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "macos": platform.mac_ver()[0],
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("mlx-ep", "mlx", "mlx-lm", "numpy")},
        "chip": str(device.get("device_name", platform.machine())),
        "metal": uses_metal(),
        "transport": comm.transport,
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("MLX_") and name not in _OF_THE_LAUNCHER
        },
        "memory_bytes": memory.total,
        "available_bytes": memory.available,
        "limit_bytes": memory_limit(None),
        "wired_limit_mb": wired_limit_mb(),
        "cores": os.cpu_count() or 1,
        "load_average": round(os.getloadavg()[0], 1),
    }


def wired_limit_mb() -> int | None:
    """macOS's iogpu.wired_limit_mb, 0 for its default; None: there is none here."""
    if platform.system() != "Darwin":
        return None
    command = ["/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.strip()
    return int(said) if said.isdecimal() else None


def unlike(facts: Sequence[MachineFacts]) -> str:
    """A table of what is not the same on all ranks, "" where all is. Pure."""
    return differences([_comparable(rank) for rank in facts])


def _comparable(rank: MachineFacts) -> dict[str, str]:
    found = dict(rank["versions"])
    found |= {"Python": rank["python"], "macOS": rank["macos"] or "-"}
    found |= {"chip": rank["chip"], "Metal": "yes" if rank["metal"] else "no"}
    found["memory"] = f"{rank['memory_bytes'] / 1e9:.0f} GB"
    wired = rank["wired_limit_mb"]
    found["wired limit"] = "-" if wired is None else f"{wired} MB"
    return found | {name: str(value) for name, value in rank["variables"].items()}
