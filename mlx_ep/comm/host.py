"""Which ranks share a host, and so its memory, disk and cores."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import uuid
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux, the same in its containers


@cache
def host_id() -> str:
    """A name of this host that no other host has: ``NAME/8 hexadecimal digits``.

    Two Macs may have one name. The digits stand for this run of the operating system:
    Linux's boot_id, macOS's kern.bootsessionuuid. So they are not the same tomorrow.
    """
    digits = hashlib.sha256(_boot().encode()).hexdigest()[:8]
    return f"{socket.gethostname()}/{digits}"


def _boot() -> str:
    if _BOOT_ID.exists():
        return _BOOT_ID.read_text()
    command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return str(uuid.getnode())
    return done.stdout.strip() or str(uuid.getnode())
