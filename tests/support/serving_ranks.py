"""`mlx_ep.server` as a user starts it: a process a rank, and its address."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.ranks import StartedCommands, start_commands

_SAYS = re.compile(r"serving .* at (http://\S+)/v1")


@contextmanager
def serving_ranks(
    num_ranks: int, *flags: str, env: dict[str, str] | None = None
) -> Iterator[tuple[StartedCommands, str]]:
    """Ranks over the ring that serve, and the address of rank 0.

    Raises:
        AssertionError: they do not serve within a minute.
    """
    argv = [sys.executable, "-m", "mlx_ep.server", "--port", "0", *flags]
    with start_commands(num_ranks, argv, env=env) as started:
        deadline = time.monotonic() + 60
        while not (found := _SAYS.search(started.outcome(0).stdout)):
            said = [started.outcome(rank) for rank in range(num_ranks)]
            assert all(one.returncode is None for one in said), said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
        yield started, found[1]
