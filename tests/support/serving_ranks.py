"""`mlx_ep.server` as a user starts it: a process a rank, and its address."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.ranks import RankOutcome, StartedCommands, start_commands
from tests.support.waiting import until

_SAYS = re.compile(r"serving .* at (http://\S+)/v1")


@contextmanager
def serving_ranks(
    num_ranks: int, *flags: str, env: dict[str, str] | None = None
) -> Iterator[tuple[StartedCommands, str]]:
    """Ranks over the ring that serve, and the address of rank 0.

    Raises:
        AssertionError: they do not come to serve.
    """
    argv = [sys.executable, "-m", "mlx_ep.server", "--port", "0", *flags]
    with start_commands(num_ranks, argv, env=env) as started:

        def said() -> list[RankOutcome]:
            return [started.outcome(rank) for rank in range(num_ranks)]

        def address() -> str:
            assert all(one.returncode is None for one in said()), said()
            found = _SAYS.search(started.outcome(0).stdout)
            return found[1] if found else ""

        yield started, until(address, said)
