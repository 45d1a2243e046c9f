"""What a command reads and writes: on rank 0 alone, and known to all."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mlx_ep.comm import Comm, broadcast_object

# Endings of what is drawn; matplotlib writes them everywhere.
PICTURES = (".png", ".pdf", ".svg")


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


def check_output(flag: str, file: Path, endings: Sequence[str] = ()) -> None:
    """Whether a file can be written when what goes into it is there.

    Args:
        flag: that names it.
        endings: its name must have one of them; none: any.

    Raises:
        ValueError: it cannot.
    """
    folder = file.absolute().parent
    target = file if file.exists() else folder
    can_write = not file.is_dir() and folder.is_dir() and os.access(target, os.W_OK)
    if can_write and target == folder:  # root may write, it says, where nobody can
        try:
            TemporaryFile(dir=folder).close()
        except OSError:
            can_write = False
    if not can_write:
        raise ValueError(
            f"{flag} must be a file in a folder that can be written; got {file}."
        )
    if endings and file.suffix.lower() not in endings:
        raise ValueError(f"{flag} must end in {', '.join(endings)}; got {file}.")


def check_outputs(args: argparse.Namespace, comm: Comm) -> None:
    """--json on rank 0, where the command has it; "-" is the standard output.

    Raises:
        ValueError: on every rank: the file cannot be written.
    """

    def check() -> None:
        if args.json is not None and str(args.json) != "-":
            check_output("--json", args.json)

    on_rank_0(check, comm, "--json")


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `file` when the body has ended.

    Where the body raises, or is interrupted, `file` stays as it was. What is no file of
    a folder that can be written, such as /dev/stdout, is written to itself.
    """
    place = file.resolve()
    is_other = place.exists() and not place.is_file()
    if is_other or not os.access(place.parent, os.W_OK):
        yield file
        return
    part = place.with_name(f".{place.stem}.{os.getpid()}{place.suffix}")
    try:
        yield part
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Write a command's --json; "-" is the standard output."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if str(file) == "-":
        print(text, end="", flush=True)
    else:
        with whole_file(file) as part:
            part.write_text(text, encoding="utf-8")


def add_json_flag(parser: argparse._ActionsContainer, what: str) -> None:
    """--json FILE."""
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"Write {what} as JSON; '-' is the standard output.",
    )


def beside(args: argparse.Namespace) -> Any:
    """Where reports go: the standard output, unless --json has that."""
    return sys.stderr if str(args.json) == "-" else sys.stdout
