"""Processes of ranks, whoever started them, and how they are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from tests.support.forked import ForkedProcess

Process = subprocess.Popen[bytes] | ForkedProcess

# For the stacks of ranks that are stopped; they end by themselves when they are out.
STACK_SECONDS = 20.0


def stop(pids: Sequence[int], processes: Sequence[Process]) -> None:
    """Ask the ranks among `pids` for their stacks, then kill what still runs."""
    if any(process.poll() is None for process in processes):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        limit = time.monotonic() + STACK_SECONDS
        while time.monotonic() < limit and any(_runs(pid, processes) for pid in pids):
            time.sleep(0.01)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _runs(pid: int, processes: Sequence[Process]) -> bool:
    for process in processes:
        if process.pid == pid:
            return process.poll() is None
    try:
        os.kill(pid, 0)  # a rank of mpirun, which takes leave of it
    except ProcessLookupError:
        return False
    return True
