"""Many prompts from a file; each answer is written, as a JSON line, when it ends."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep import cli
from mlx_ep.api import PreparedModel
from mlx_ep.comm import Comm
from mlx_ep.data_parallel import (
    Answer,
    can_batch,
    generate_replicated,
    generate_sharded,
)
from mlx_ep.generate.draft import draft_report
from mlx_ep.generate.prompts import Prompt, read_prompts
from mlx_ep.generate.speculative import Drafting, SpeculativeGenerator
from mlx_ep.generate.tokens import prompt_tokens
from mlx_ep.metrics import format_bytes
from mlx_ep.types import Sampler

_log = logging.getLogger(__name__)


@dataclass
class PromptBatch:
    """The prompts of a file that have no answer yet.

    Attributes:
        prompts: all of the file.
        todo: the numbers of those without an answer, in ascending order.
        output: where rank 0 writes; None on the other ranks.
        name: of the output, for errors.
        tokens: of every prompt of `todo`; made by `check`.
    """

    prompts: list[Prompt]
    todo: list[int]
    output: TextIO | None
    name: str
    tokens: list[list[int]] = field(default_factory=list)

    def check(self, args: argparse.Namespace, prepared: PreparedModel) -> None:
        """Make the tokens; whether the model can do what the prompts ask for.

        Raises:
            ValueError: it cannot. Every rank finds the same.
        """
        cli.check_for_model(args, prepared, args.extra_eos_token)
        cli.check_sampling([p.flags(args) for p in self.prompts], prepared)
        if not can_batch(prepared.weights.outline()):
            raise ValueError(
                f"mlx-lm cannot run several sequences of {args.model} at once (its KV "
                "cache does not merge); use --prompt."
            )
        self.tokens = [
            prompt_tokens(args, prepared.tokenizer, self.prompts[i].messages)
            for i in self.todo
        ]
        cli.check_context(self.tokens, prepared, "--prompts-file")

    def write(self, answer: Answer, tokenizer: TokenizerWrapper) -> None:
        """Write an answer to a prompt of `todo`, on rank 0, so that it stays.

        Raises:
            RuntimeError: it cannot be written.
        """
        if self.output is None:
            return
        number = self.todo[answer.prompt]
        prompt = self.prompts[number]
        record: dict[str, Any] = {"index": number}
        if prompt.id is not None:
            record["id"] = prompt.id
        record |= {
            "prompt": prompt.text,
            "text": tokenizer.decode(answer.tokens),
            "prompt_tokens": len(self.tokens[answer.prompt]),
            "generation_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        if answer.num_drafted is not None:
            record["draft_tokens"] = answer.num_drafted
            record["accepted_draft_tokens"] = answer.num_accepted
        try:
            self.output.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.output.flush()
        except OSError as error:
            raise RuntimeError(
                f"{self.name} cannot be written: {error}. The answers before are in "
                "it; with room again, --resume goes on from there."
            ) from error


def plan_batch(args: argparse.Namespace, comm: Comm) -> PromptBatch:
    """Read --prompts-file and open --output, on rank 0; every rank must call it.

    Raises:
        ValueError: on every rank: one of them cannot be read, written or gone on with.
    """
    output: TextIO | None = None

    def open_both() -> Any:
        nonlocal output
        prompts = read_prompts(args)
        if args.output is None:
            output = sys.stdout
            return [list(map(asdict, prompts)), []]
        output, answered = _open_output(args.output, prompts, args.resume)
        return [list(map(asdict, prompts)), sorted(answered)]

    found, answered = cli.on_rank_0(open_both, comm, "--prompts-file")
    prompts = [Prompt(**prompt) for prompt in found]
    todo = sorted(set(range(len(prompts))) - set(answered))
    if answered:
        _log.info(
            "%d of %d prompts have an answer in %s", len(answered), len(prompts),
            args.output,
        )  # fmt: skip
    return PromptBatch(prompts, todo, output, str(args.output or "The standard output"))


def _open_output(
    path: Path, prompts: Sequence[Prompt], resume: bool
) -> tuple[TextIO, set[int]]:
    """The file to write to, and the prompts that have an answer in it.

    Raises:
        ValueError: the file cannot be written, holds something already, or answers
            to other prompts.
    """
    try:
        has_content = path.exists() and path.stat().st_size > 0
        if has_content and not resume:
            raise ValueError(
                f"--output must be a new file; {path} holds something. Give --resume "
                "to go on with it, or another name."
            )
        file = path.open("r+" if has_content else "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--output must be a file that can be written: {error}."
        ) from None
    if not has_content:
        return file, set()
    content = path.read_bytes()
    # An interrupted line has no end: it is taken away, and its prompt answered again.
    whole = content[: content.rfind(b"\n") + 1]
    answered = {
        _answered(line, prompts, f"--output {path}, line {number}")
        for number, line in enumerate(whole.splitlines(), 1)
    }
    file.seek(len(whole))
    file.truncate()
    return file, answered


def _answered(line: bytes, prompts: Sequence[Prompt], where: str) -> int:
    """The number of the prompt that a line of the output answers."""
    try:
        record = json.loads(line)
        number, text, name = record["index"], record["prompt"], record.get("id")
        prompt = prompts[number]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(
            f"{where} must be an answer to a prompt of --prompts-file; got "
            f"{line[:60].decode(errors='replace')}. Give another --output."
        ) from None
    if (text, name) != (prompt.text, prompt.id):
        raise ValueError(
            f"{where} answers {str(text)[:40]!r}; the prompt with that number in "
            f"--prompts-file is {str(prompt.text)[:40]!r}. --resume needs the file "
            "that the answers are to."
        )
    return int(number)


def answer_all(
    args: argparse.Namespace,
    comm: Comm,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    batch: PromptBatch,
    draft: nn.Module | None = None,
) -> None:
    """Answer every prompt that has no answer; rank 0 writes.

    Args:
        draft: a draft model, read; None: none.
    """
    flags = [batch.prompts[number].flags(args) for number in batch.todo]
    samplers = _samplers(args, flags, tokenizer, comm, shared=not args.data)
    make_generator: Any = BatchGenerator
    if draft is not None:
        own = _samplers(args, flags, tokenizer, comm, shared=False)
        # The proposals of a turn travel together, not each as it is drawn.
        drafting = Drafting(
            draft,
            args.num_draft_tokens,
            dict(zip(samplers, own, strict=True)),
            (lambda proposals: proposals) if args.data else comm.broadcast,
        )
        make_generator = partial(SpeculativeGenerator, drafting=drafting)
    start = time.perf_counter()
    result = (generate_sharded if args.data else generate_replicated)(
        model,
        tokenizer,
        batch.tokens,
        comm,
        max_tokens=[each.max_tokens for each in flags],
        sampler=samplers,
        on_answer=lambda answer: batch.write(answer, tokenizer),
        make_generator=make_generator,
        prefill_step_size=args.prefill_step_size,
        max_kv_size=args.max_kv_size,
        completion_batch_size=args.batch_size,
        prefill_batch_size=min(args.batch_size, 8),
    )
    seconds = time.perf_counter() - start
    if comm.rank == 0 and args.verbose:
        num_tokens = sum(len(answer.tokens) for answer in result.answers)
        held = ", ".join(
            f"rank {rank} {format_bytes(num_bytes)}"
            for rank, num_bytes in enumerate(result.cache_bytes)
        )
        print(
            f"Prompts: {len(batch.todo)}, {len(batch.todo) / seconds:.3f} per second\n"
            f"Generation: {num_tokens} tokens, {num_tokens / seconds:.3f} "
            f"tokens-per-sec\nKV cache at most: {held}",
            file=sys.stderr,
        )
        if draft is not None:
            num_accepted = sum(answer.num_accepted or 0 for answer in result.answers)
            num_drafted = sum(answer.num_drafted or 0 for answer in result.answers)
            print(draft_report(num_accepted, num_drafted), file=sys.stderr)


def _samplers(
    args: argparse.Namespace,
    flags: Sequence[argparse.Namespace],
    tokenizer: TokenizerWrapper,
    comm: Comm,
    shared: bool,
) -> list[Sampler]:
    """One for every prompt; those with the same settings share it, and its batches.

    Args:
        shared: whether a token is rank 0's on every rank.
    """
    names = ("temp", "top_p", "min_p", "min_tokens_to_keep", "top_k",
             "xtc_probability", "xtc_threshold")  # fmt: skip
    made: dict[tuple[Any, ...], Sampler] = {}
    samplers = []
    for each in flags:
        key = tuple(getattr(each, name) for name in names)
        if key not in made:
            made[key] = (
                cli.shared_sampler(each, tokenizer, comm)
                if shared
                else cli.rank_sampler(each, tokenizer)
            )
        samplers.append(made[key])
    return samplers
