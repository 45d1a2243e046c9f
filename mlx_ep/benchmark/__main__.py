"""``mlx_ep.benchmark layer`` and ``mlx_ep.benchmark e2e``, on every rank."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from textwrap import fill
from typing import Any

from mlx_ep import cli
from mlx_ep.benchmark import legacy, plot, report
from mlx_ep.benchmark.arms import ARM_STRATEGIES, why_not
from mlx_ep.benchmark.e2e import ModelRun, measure_model
from mlx_ep.benchmark.flags import chosen_arms, chosen_runners, make_parser
from mlx_ep.benchmark.layer import LayerRun, check_layer, measure_layer
from mlx_ep.benchmark.models import ModelSource, Prepared, prepare_arms, why_no_shard
from mlx_ep.benchmark.samples import Budget
from mlx_ep.benchmark.shapes import (
    default_dtype,
    make_shape,
    make_weights,
    parse_counts,
)
from mlx_ep.comm import Comm, GroupComm, agreed
from mlx_ep.loading import model_shape, read_config
from mlx_ep.measure.machine import (
    check_memory,
    facts_text,
    machine_facts,
    pin_ranks,
)


def layer_plan(
    args: argparse.Namespace, num_ranks: int
) -> tuple[LayerRun, Sequence[str]]:
    """What the flags ask for, and notes for the output.

    Raises:
        ValueError: it cannot be measured.
    """
    mode = args.quantization or ("mxfp4" if args.shape == "gpt-oss-120b" else "affine")
    weights = make_weights(mode, args.bits, args.group_size, args.dtype)
    shape = make_shape(args.shape, args.scale, weights)
    arms, notes = chosen_arms(
        args,
        partial(
            why_not, level="layer", shape=shape, weights=weights, num_ranks=num_ranks
        ),
    )
    if args.legacy_3158 and num_ranks == 1:
        raise ValueError("--legacy-3158 compares EP with TP: it needs 2 ranks or more.")
    plan = LayerRun(
        shape=shape,
        weights=weights,
        arms=arms,
        runners=chosen_runners(args.runners),
        tokens=parse_counts("--tokens", args.tokens),
        skew=args.skew,
        seed=args.seed,
        budget=Budget(args.budget, args.samples),
        memory_limit_gb=args.memory_limit_gb,
        legacy=args.legacy_3158,
    )
    return plan, notes


def layer_heading(plan: LayerRun, args: argparse.Namespace) -> str:
    """What was measured, in words."""
    shape = plan.shape
    scaled = (
        ""
        if args.scale == 1
        else f" **Scaled:** D and F are 1/{args.scale} of {args.shape}'s."
    )
    routing = "uniform" if not plan.skew else f"popularity 1/rank^{plan.skew:g}"
    has_ep = any(arm in ARM_STRATEGIES for arm in plan.arms)
    runner = f" Runner of the ep arms: {', '.join(plan.runners)}." if has_ep else ""
    return (
        f"One MoE layer, {shape.name}: E={shape.num_experts}, D={shape.width}, "
        f"F={shape.expert_width}, K={shape.top_k}, {shape.packing}, {args.dtype} "
        f"tokens, routing {routing}.{scaled}{runner} Medians over samples of the "
        f"slowest rank, up to {plan.budget.most} or {plan.budget.seconds:g} s a point; "
        f"arms in turn, a barrier before each sample."
    )


def run_layer(args: argparse.Namespace, comm: GroupComm) -> None:
    """Level layer, on this rank."""
    with cli.usage_errors():
        plan, notes = layer_plan(args, comm.size)
        check_plot(args, comm)
        pinning = pin_ranks(comm) if args.pin else "not pinned"
        check_layer(plan, comm)
    facts = machine_facts(comm, pinning)
    say = printer(args, comm)
    title = layer_heading(plan, args)
    say(f"# mlx_ep.benchmark: layer\n\n{facts_text(facts)}\n\n{title}\n")
    for note in notes:
        say(f"Note: {note}.")
    records = measure_layer(plan, comm, progress_of(comm, plan.runners))
    say(f"\n{report.layer_table(records, plan.runners)}\n")
    say(report.stage_table(records, plan.runners))
    if plan.legacy:
        say(f"\n{legacy.LEFT_OUT}")
    write_files(args, comm, facts, records, title, plan.runners)


def model_plan(
    args: argparse.Namespace, comm: GroupComm
) -> tuple[ModelRun, Prepared, list[str]]:
    """What the flags ask for, checked on all ranks, and notes for the output.

    Raises:
        ValueError: on every rank: it cannot be measured.
    """
    runners = chosen_runners(args.runners)
    if len(runners) > 1:
        raise ValueError(f"Level e2e takes one --runner; got {args.runners}.")
    if args.max_tokens < 2:
        raise ValueError(
            "--max-tokens must be 2 or more, as the first is the prompt's."
        )
    check_plot(args, comm)
    batches = parse_counts("--batch", args.batch)
    source = ModelSource(
        args.model,
        args.revision,
        args.dummy_weights,
        runners[0],
        args.memory_limit_gb,
        args.trust_remote_code,
    )
    config = agreed(comm, lambda: read_config(source.path()))
    if comm.size > 1:
        problem = why_no_shard(source, comm.size)
    arms, notes = chosen_arms(
        args,
        lambda arm: (
            why_not(arm, "e2e", None, None, comm.size)
            or (problem if arm in ("tp", "ep-tensor") else "")
        ),
    )
    prepared = prepare_arms(source, arms, comm)
    shape = model_shape(config, dtype=default_dtype(), name=args.model)
    plan = ModelRun(
        shape=shape,
        batches=batches,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.max_tokens,
        vocabulary=config.get("text_config", config)["vocab_size"],
        moe_layers=shape.num_moe_layers,
        prefill_step=args.prefill_step_size,
        seed=args.seed,
        budget=Budget(args.budget, args.samples),
    )
    return plan, prepared, notes


def run_e2e(args: argparse.Namespace, comm: GroupComm) -> None:
    """Level e2e, on this rank."""
    with cli.usage_errors():
        pinning = pin_ranks(comm) if args.pin else "not pinned"
        plan, prepared, notes = model_plan(args, comm)
        check_memory(comm, prepared.need_bytes, args.memory_limit_gb)
    facts = machine_facts(comm, pinning)
    say = printer(args, comm)
    kind = "random weights" if args.dummy_weights else "its weights"
    title = (
        f"Model {args.model}, {kind}, {plan.shape.num_bytes / 1e9:.2f} GB in matrices, "
        f"experts {plan.shape.layer.packing}: prompts of {plan.prompt_tokens} random "
        f"tokens, {plan.new_tokens} generated greedily. Prefill: until every sequence "
        "has its first token; decode: each step after that. Runner of the ep arms: "
        f"{args.runners}. Medians over samples of the slowest rank; arms in turn, a "
        "barrier before each sample. Collectives, bytes and memory are of the busiest "
        "rank, the first two per MoE layer and with those of the attention."
    )
    say(f"# mlx_ep.benchmark: e2e\n\n{facts_text(facts)}\n\n{title}\n")
    for note in notes:
        say(f"Note: {note}.")
    arms = prepared.load(comm)
    records = measure_model(plan, arms, comm, progress_of(comm, [args.runners]))
    say(f"\n{report.model_table(records)}\n")
    if staged := [r for r in records if sum(r["stages"].values())]:
        say(report.stage_table(staged, [args.runners]))
    write_files(args, comm, facts, records, title, [args.runners])


def check_plot(args: argparse.Namespace, comm: GroupComm) -> None:
    """Raises:
    ValueError: on every rank: rank 0 cannot draw, or not write --json or --plot.
    """

    def check() -> None:
        if args.json is not None and str(args.json) != "-" and comm.rank == 0:
            cli.check_output("--json", args.json)
        if args.plot is not None and comm.rank == 0:
            plot.check_can_plot()
            cli.check_output("--plot", args.plot, cli.PICTURES)

    agreed(comm, check)


def printer(args: argparse.Namespace, comm: GroupComm) -> Callable[[str], None]:
    """Prints on rank 0; on the standard error where --json has the output."""
    file = cli.beside(args)

    def say(text: str) -> None:
        if comm.rank == 0:
            print("\n".join(map(wrapped, text.split("\n"))), file=file, flush=True)

    return say


def wrapped(line: str) -> str:
    """A sentence in lines of 79 characters; tables and commands stay as they are."""
    if len(line) <= 79 or line.startswith(("|", "    ")):
        return line
    more = "  " if line.startswith("- ") else ""
    return fill(
        line, 79, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )


def progress_of(
    comm: GroupComm, runners: Sequence[str]
) -> Callable[[list[dict[str, Any]]], None]:
    """Tells of each point on the standard error, on rank 0."""

    def tell(records: list[dict[str, Any]]) -> None:
        if comm.rank == 0:
            times = ", ".join(
                f"{report.arm_label(r, runners)} "
                f"{report.seconds_text(r['seconds_median'])}"
                for r in records
            )
            points = " and ".join(dict.fromkeys(map(report.point_label, records)))
            print(f"{points}: {times}", file=sys.stderr, flush=True)

    return tell


def write_files(
    args: argparse.Namespace,
    comm: GroupComm,
    facts: dict[str, Any],
    records: Sequence[dict[str, Any]],
    title: str,
    runners: Sequence[str],
) -> None:
    """--json and --plot, by rank 0."""
    if comm.rank != 0:
        return
    if args.json is not None:
        report.write_json(args.json, {**facts, "title": title}, records)
    if args.plot is not None:
        plot.plot_records(args.plot, title, records, runners)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:  # no ranks, no model
        from mlx_ep.benchmark.serve import main as serve

        return serve(sys.argv[2:])

    def body(args: argparse.Namespace, comm: Comm) -> None:
        assert isinstance(comm, GroupComm)
        (run_layer if args.level == "layer" else run_e2e)(args, comm)

    cli.run(make_parser(), body)


if __name__ == "__main__":
    main()
