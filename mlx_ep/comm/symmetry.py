"""What must be alike on all ranks: compared before the first step.

Ranks that differ in a flag, a stop token or a byte of a weight wait for each other for
ever, or give wrong text without a word. Each rank says what it has as facts, a name and
a short text; where they differ, all ranks are told who has what, and end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_ep.comm.base import Comm
from mlx_ep.comm.objects import gather_objects

Facts = Mapping[str, str]

MOST_CHARACTERS = 40  # of a fact in the table
MOST_FACTS = 20  # lines of the table
NOTHING = "-"  # a rank that does not have the fact


def check_alike(comm: Comm, facts: Facts, what: str) -> None:
    """Compares the facts of all ranks. Every rank must call it.

    Args:
        facts: of this rank; equal texts are equal facts.
        what: what the facts are of, and what to do; the first line of the message.

    Raises:
        ValueError: on every rank, with the same table of who has what: they differ.
    """
    if table := differences(gather_objects(comm, dict(facts))):
        raise ValueError(f"{what}\n{table}")


def differences(ranks: Sequence[Facts]) -> str:
    """A table of the facts that are not alike on all ranks; "" where all are.

        |               | rank 0   | rank 1   |
        | chat template | 3fa4b1c2 | 9c01aa00 |

    Args:
        ranks: the facts of each rank.
    """
    names = dict.fromkeys(name for facts in ranks for name in facts)
    rows = [
        [name, *(_shown(facts.get(name)) for facts in ranks)]
        for name in names
        if len({facts.get(name) for facts in ranks}) > 1
    ]
    if not rows:
        return ""
    more = len(rows) - MOST_FACTS
    rows = [["", *(f"rank {rank}" for rank in range(len(ranks)))], *rows[:MOST_FACTS]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([*lines, *([f"| and {more} more |"] if more > 0 else [])])


def digest(value: Any) -> str:
    """A short name of bytes, or of anything JSON can hold, that stands for it."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(value).hexdigest()[:16]


def _shown(fact: str | None) -> str:
    if fact is None:
        return NOTHING
    if len(fact) <= MOST_CHARACTERS:
        return fact
    # What is cut off may be the difference.
    return f"{fact[: MOST_CHARACTERS - 20]}... ({digest(fact)})"
