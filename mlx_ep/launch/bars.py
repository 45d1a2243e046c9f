"""Bars of ranks whose output passes through the launcher. Pure."""

from __future__ import annotations

BARS = "MLX_EP_BARS"  # mlx_ep.loading.progress reads it


def bar_of(rest: bytes) -> tuple[bytes | None, bytes]:
    """The newest state of a bar in output without an end of line.

    A bar is drawn over itself: each state follows a carriage return.

    Args:
        rest: what came after the last end of line.

    Returns:
        The state (blank: the bar has ended; None: there is none), and what is left to
        be read on.
    """
    _, *states = rest.split(b"\r")
    shown = [state for state in states if state]
    if not shown:
        return None, rest
    last = states[-1]
    return shown[-1], b"\r" + last


def drawn(bar: bytes, line: int, columns: int) -> bytes:
    """What draws a bar so many lines below the cursor, and puts the cursor back."""
    text = bar.decode(errors="replace").rstrip()[: columns - 1].encode()
    up = f"\x1b[{line}A".encode() if line else b""
    return b"\n" * line + b"\r" + text + b"\x1b[K" + up + b"\r"
