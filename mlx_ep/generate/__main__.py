"""``mlx_ep.generate`` and ``python -m mlx_ep.generate``."""

from __future__ import annotations

import argparse
import sys
from typing import TextIO

import mlx.nn as nn

from mlx_ep import cli
from mlx_ep.comm import Comm, broadcast_object, gather_objects
from mlx_ep.generate.batch import answer_all, plan_batch
from mlx_ep.generate.flags import make_parser
from mlx_ep.generate.reuse import (
    check_cache_length,
    find_draft,
    read_cache,
    reuse_options,
)
from mlx_ep.generate.stream import stream
from mlx_ep.generate.tokens import prompt_tokens, tokens_after_cache, user_message
from mlx_ep.loading import EMBEDDED_MODEL
from mlx_ep.metrics import exposure_table, stage_table


def main() -> None:
    cli.run(make_parser(), _generate)


def _generate(args: argparse.Namespace, comm: Comm) -> None:
    (_one if args.prompts_file is None else _many)(args, comm)


def _one(args: argparse.Namespace, comm: Comm) -> None:
    """One prompt, streamed to the standard output."""
    with cli.usage_errors():
        cli.check_outputs(args, comm)
        cli.check_record_name(args.record)
        text = cli.read_text(args.prompt, args.prompt_file, comm, "--prompt")
        cache = read_cache(args, comm)
        args.model = args.model or (cache.model if cache else EMBEDDED_MODEL)
        extra = cache.tokenizer_config if cache else None
        prepared = cli.prepare_model(args, comm, extra)
        cli.check_for_model(args, prepared, args.extra_eos_token)
        draft = find_draft(args, prepared, comm)
        check_cache_length(cache, prepared, draft)
        tokens_of = prompt_tokens if cache is None else tokens_after_cache
        prompt = tokens_of(args, prepared.tokenizer, [user_message(text)])
        cli.check_context([prompt], prepared, "--prompt")
        # A template may name the day, and midnight falls between the ranks.
        prompt = broadcast_object(comm, prompt)
        model, tokenizer = prepared.load()
    cli.seed_ranks(args.seed, prepared)
    model.expert_parallel.group.timings.enabled = args.timings
    if args.verbose:
        cli.print_reports(model, comm, args.config, cli.beside(args))
    options = cli.cache_options(args) | reuse_options(args, draft, cache)
    with cli.recorded(args.record, model, comm):
        stream(args, comm, model, tokenizer, prompt, options)
    if args.timings:
        _print_timings(model, comm, cli.beside(args))


def _many(args: argparse.Namespace, comm: Comm) -> None:
    """Every prompt of a file, each answer written when it ends."""
    with cli.usage_errors():
        cli.check_record_name(args.record)
        args.model = args.model or EMBEDDED_MODEL
        batch = plan_batch(args, comm)
        if not batch.todo:
            return
        prepared = cli.prepare_model(args, comm)
        batch.check(args, prepared)
        draft = find_draft(args, prepared, comm)
        model, tokenizer = prepared.load()
        draft_model = draft.load() if draft else None
    cli.seed_ranks(args.seed, prepared)
    model.expert_parallel.group.timings.enabled = args.timings
    if args.verbose:
        cli.print_reports(model, comm, args.config, sys.stderr)
    with cli.recorded(args.record, model, comm):
        answer_all(args, comm, model, tokenizer, batch, draft_model)
    if args.timings:
        _print_timings(model, comm, sys.stderr)


def _print_timings(model: nn.Module, comm: Comm, file: TextIO) -> None:
    """Each stage's share of the MoE layers, by rank 0, one column a rank.

    And what of the exchange is hidden, where something hides it.
    """
    group = model.expert_parallel.group
    group.timings.enabled = False
    ranks = gather_objects(comm, group.timings.seconds)
    hidden = gather_objects(comm, group.overlap.exposure.per_layer())
    if comm.rank == 0:
        print(stage_table(ranks, group.timings.layer_calls), file=file, flush=True)
        if table := exposure_table(hidden):
            print(f"\n{table}", file=file, flush=True)


if __name__ == "__main__":
    main()
