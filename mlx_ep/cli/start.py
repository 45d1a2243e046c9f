"""What the commands share: starting on all ranks, and wrong usage.

Wrong usage is one line and exit code 2 on every rank, before a weight is read. Any
other failure ends all ranks with exit code 1 and its reason (`mlx_ep.comm.liveness`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn, TextIO

import mlx.nn as nn

from mlx_ep.api import PreparedModel, prepare
from mlx_ep.cli.checks import check_here
from mlx_ep.cli.parser import Parser, UsageError
from mlx_ep.cli.say import one_line_warnings
from mlx_ep.comm import Comm, GroupComm, agreed, init
from mlx_ep.comm.launch import start_channel
from mlx_ep.comm.liveness import fail_with, guard, joined_texts
from mlx_ep.comm.symmetry import check_alike
from mlx_ep.config import EPConfig
from mlx_ep.exchange import backend_line

# What a host may have of its own: places of files, whose contents are compared, and
# what rank 0 alone reads or all take from it.
_OWN_FLAGS = {
    "model", "draft_model", "adapter_path", "output", "prompt", "prompts_file",
    "prompt_file", "prompt_cache_file", "placement_file", "memory_limit_gb", "download",
    "log_level", "verbose", "config",
}  # fmt: skip
_DIFFERENT_FLAGS = "All ranks must have the same flags; these differ:"


def run(
    parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace, Comm], None]
) -> None:
    """Parse the command line, start all ranks and run `body` on each."""
    assert isinstance(parser, Parser)
    with one_line_warnings():
        args, comm = _start(parser)
        try:
            with guard(comm.group):
                with usage_errors():
                    check_alike(comm, flag_facts(args), _DIFFERENT_FLAGS)
                body(args, comm)
                # mlx-lm begins the step after the last token too: a rank that left now
                # would take its part of that step's collectives away from the others.
                comm.barrier()
        except FloatingPointError as error:  # of the only rank
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        except UsageError as error:  # every rank is here, with the same text
            _exit_by_usage(parser, str(error), comm.rank)


def flag_facts(args: argparse.Namespace) -> dict[str, str]:
    """The flags that must be alike on all ranks, with their values."""
    return {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in sorted(vars(args).items())
        if name not in _OWN_FLAGS and not isinstance(value, (Path, EPConfig))
    }


def _start(parser: Parser) -> tuple[argparse.Namespace, GroupComm]:
    """Parse the command line and join the ranks; what fails on one ends all."""
    try:
        channel = start_channel()
    except ValueError as error:
        parser.error(str(error))
    Parser.raises = True
    try:
        args = parser.parse_args()
        return args, init(num_ranks=args.ranks)
    except (ValueError, UsageError) as error:
        problem = str(error)
    except RuntimeError as error:  # the other ranks are not there
        if channel is not None:
            channel.fail(str(error))
        parser.exit(1, f"{parser.prog}: {error}\n")
    except SystemExit:  # --help
        if channel is not None:
            channel.close()
        raise
    except BaseException as error:
        fail_with(error)
    finally:
        Parser.raises = False
    if channel is None:
        parser.error(problem)
    texts = channel.leave_with_usage_error(problem)
    _exit_by_usage(parser, joined_texts(texts), channel.rank)


def _exit_by_usage(parser: Parser, text: str, rank: int) -> NoReturn:
    """One line by rank 0, exit code 2 on every rank."""
    if rank == 0:
        parser.error(text)
    sys.exit(2)


@contextmanager
def usage_errors() -> Iterator[None]:
    """A ValueError in the body is wrong usage; also where only some ranks raise it."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def prepare_model(
    args: argparse.Namespace,
    comm: Comm,
    tokenizer_config: dict[str, Any] | None = None,
) -> PreparedModel:
    """Check on all ranks the model that the flags of `add_model_flags` name.

    Args:
        tokenizer_config: further arguments of the tokenizer; the flags go first.

    Raises:
        ValueError: as `mlx_ep.api.prepare`; also where the flags ask for what there is
            not on a rank.
    """
    agreed(comm, lambda: check_here(args))
    prepared = prepare(
        args.model,
        comm,
        args.config,
        tokenizer_config={
            **(tokenizer_config or {}),
            "trust_remote_code": args.trust_remote_code,
        },
        revision=args.revision,
        dummy_weights=args.dummy_weights,
    )
    # transformers warns on every rank of more tokens than the model has positions, also
    # of texts that are cut into pieces; prompts are refused by `check_context`.
    said = getattr(prepared.tokenizer, "deprecation_warnings", {})
    said["sequence-length-is-longer-than-the-specified-maximum"] = True
    return prepared


def print_reports(
    model: nn.Module, comm: Comm, config: EPConfig, file: TextIO = sys.stdout
) -> None:
    """Of every rank what it holds, by rank 0, and two lines for the strategy."""
    if comm.rank == 0:
        for report in model.expert_parallel.reports:
            print(fill(str(report), 79, subsequent_indent="  "), file=file)
        mode = f" ({config.mode})" if config.strategy == "all_to_all" else ""
        if config.attention != "replicated":
            print(model.expert_parallel.attention, file=file)
        print(f"strategy: {config.strategy}{mode}", file=file)
        is_dense = not model.expert_parallel.blocks
        print(backend_line(config, comm.size, is_dense), file=file, flush=True)
