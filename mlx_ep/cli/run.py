"""What the commands share: starting on all ranks, and wrong usage.

Wrong usage is one line and exit code 2 on every rank, before a weight is read. Any
other failure ends all ranks with exit code 1 and its reason (`mlx_ep.comm.liveness`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import mlx.nn as nn

from mlx_ep.api import PreparedModel, prepare
from mlx_ep.cli.flags import ep_config
from mlx_ep.cli.parser import UsageError
from mlx_ep.comm import Comm, init
from mlx_ep.comm.liveness import guard
from mlx_ep.config import (
    EPConfig,
)


def run(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace, Comm], None],
) -> None:
    """Parse the command line, start all ranks and run `body` on each."""
    args = parser.parse_args()
    try:
        ep_config(args)
        comm = init(num_ranks=args.ranks)
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:  # the other ranks are not there
        parser.exit(1, f"{parser.prog}: {error}\n")
    usage_error = ""
    with guard(comm.group):
        try:
            body(args, comm)
            # mlx-lm begins the step after the last token too: a rank that left now
            # would take its part of that step's collectives away from the others.
            comm.barrier()
        except UsageError as error:
            usage_error = str(error)
    # Outside of guard: every rank leaves by itself, with the same code.
    if usage_error and comm.rank == 0:
        parser.error(usage_error)
    if usage_error:
        sys.exit(2)


@contextmanager
def usage_errors() -> Iterator[None]:
    """A ValueError in the body is wrong usage; it must be raised on every rank."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def prepare_model(
    args: argparse.Namespace,
    comm: Comm,
    config: EPConfig,
    tokenizer_config: dict[str, Any] | None = None,
) -> PreparedModel:
    """Check on all ranks the model that the flags of `add_model_flags` name.

    Args:
        tokenizer_config: further arguments of the tokenizer; the flags go first.

    Raises:
        ValueError: as `mlx_ep.api.prepare`.
    """
    return prepare(
        args.model,
        comm,
        config,
        tokenizer_config={
            **(tokenizer_config or {}),
            "trust_remote_code": args.trust_remote_code,
        },
        revision=args.revision,
        dummy_weights=args.dummy_weights,
    )


def print_reports(
    model: nn.Module, comm: Comm, config: EPConfig, file: TextIO = sys.stdout
) -> None:
    """One line per rank, by rank 0, in rank order, and one for the strategy."""
    if comm.rank == 0:
        for report in model.expert_parallel.reports:
            print(report, file=file)
        mode = f" ({config.mode})" if config.strategy == "all_to_all" else ""
        if config.attention != "replicated":
            print(model.expert_parallel.attention, file=file)
        print(f"strategy: {config.strategy}{mode}", file=file, flush=True)
