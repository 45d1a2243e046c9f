"""What rank 0 prints when a run ends: who, where, since when, and all stacks."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

MOST_STACK_LINES = 60  # of one rank
SILENT = 1.0  # seconds without a beat from which on the report says so


def describe_place(place: Mapping[str, Any]) -> str:
    """Where a rank is, in words: "decode, step 12, layer 3, all_reduce"."""
    parts = [place["phase"]]
    for name in ("step", "layer"):
        if place[name] is not None:
            parts.append(f"{name} {place[name]}")
    return ", ".join([*parts, *([place["stage"]] if place["stage"] else [])])


def render_report(
    text: str,
    places: Mapping[int, Mapping[str, Any]],
    asked: Sequence[int],
    stacks: Mapping[int, str],
) -> str:
    """The report of a run's end.

    Args:
        text: the reason.
        places: the last beat of each rank.
        asked: the ranks that were asked for their stacks; none makes it one line.
        stacks: what they said.
    """
    line = text if text.startswith("rank 0 ") else f"rank 0 ends: {text}"
    lines = [f"[mlx_ep] {line}"]
    if not asked:
        return lines[0]
    for rank, place in sorted(places.items()):
        state = "stopped" if place["stopped"] else "running"
        if place.get("gone"):
            state = "gone"
        elif place["interpreter"] > SILENT and not place["stopped"]:
            state += f", interpreter silent for {place['interpreter']:.0f} s"
        lines.append(
            f"[mlx_ep]   rank {rank}: {describe_place(place)}, for "
            f"{place['since']:.1f} s; {state}"
        )
    for rank in asked:
        words = stacks.get(rank, "(no answer)").strip() or "(no answer)"
        lines.append(f"[mlx_ep] stacks of rank {rank}:")
        lines += words.splitlines()[:MOST_STACK_LINES]
    return "\n".join(lines)


def signal_text(rank: int, number: int) -> str:
    """What happened to a rank that got a signal."""
    if number == signal.SIGINT:
        return f"rank {rank} was interrupted (Ctrl-C)"
    return f"rank {rank} was told to end ({signal.Signals(number).name})"
