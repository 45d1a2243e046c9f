"""What a command reads from the user: on rank 0 alone, and known to all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_ep.comm import Comm, broadcast_object


def on_rank_0(read: Callable[[], Any], comm: Comm, flag: str) -> Any:
    """What rank 0 reads, on every rank, as JSON would hold it.

    A launcher may feed only rank 0, and only its host may have a file.

    Args:
        flag: that names what is read.

    Raises:
        ValueError: on every rank, when it cannot.
    """
    found: Any = None
    problem = ""
    if comm.rank == 0:
        try:
            found = read()
        except UnicodeDecodeError as error:
            problem = f"{flag} must be text in UTF-8; got {error}."
        except OSError as error:
            problem = f"{flag}: {error}"
        except ValueError as error:
            problem = str(error)
    found, problem = broadcast_object(comm, [found, problem])
    if problem:
        raise ValueError(problem)
    return found


def read_text(text: str | None, file: Path | None, comm: Comm, flag: str) -> str:
    """A prompt: a text, what a file holds, or "-" for the standard input.

    Args:
        file: goes before `text`.
        flag: of the prompt.

    Raises:
        ValueError: on every rank, when it cannot be read or is empty.
    """

    def read() -> str:
        if file is not None:
            found = file.read_bytes().decode("utf-8")
        elif text == "-":
            found = sys.stdin.buffer.read().decode("utf-8")
        else:
            found = (text or "").replace("\\n", "\n").replace("\\t", "\t")
        if not found.strip():
            raise ValueError("The prompt must not be empty; give one with --prompt.")
        return found

    if file is not None:
        source = f"{flag}-file"
    else:
        source = "The standard input" if text == "-" else flag
    return str(on_rank_0(read, comm, source))
