"""What every rank would hold, where it does not fit, and how fast it would be.

One process, no launcher: sizes come from config.json and the headers of weight files.
The exit code is 1 where a rank's memory is too small.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from textwrap import fill
from typing import Any

from mlx_ep import cli
from mlx_ep.cost.plausible import implausible
from mlx_ep.loading.caches import cache_growth
from mlx_ep.loading.estimate import rank_outline
from mlx_ep.loading.sizes import held_bytes
from mlx_ep.metrics import format_bytes
from mlx_ep.placement import Placement, write_placement
from mlx_ep.plan.build import Plan, make_plan
from mlx_ep.plan.flags import make_parser
from mlx_ep.plan.load import check_load_flags, make_load, print_load
from mlx_ep.plan.picture import check_picture_flags, plot_record
from mlx_ep.plan.report import needs_json, needs_table, workload_lines
from mlx_ep.plan.speeds import speeds_text
from mlx_ep.plan.stages import check_stage_flags, stages_json, stages_table


def plan_text(plan: Plan, name: str) -> str:
    """Everything, for a person."""
    model, workload, needs = plan.model, plan.workload, plan.needs
    whole = model.make(Placement.contiguous(model.num_experts, 1), 0)
    made = rank_outline(model, plan.placement, 0, workload.attention)
    growth = cache_growth(made, workload.context, workload.quantization, workload.step)
    lines = [
        f"{name}: {model.config['model_type']}, {model.num_experts} experts per MoE "
        f"layer, {format_bytes(held_bytes(whole))} of weights",
        f"sizes from {model.source}",
        *workload_lines(workload, growth),
        *([f"why: {plan.reason}"] if plan.reason else []),
        "",
        needs_table(needs),
        *([] if plan.stages is None else ["", stages_table(plan.stages), ""]),
    ]
    if needs[0].memory is not None and not plan.fits:
        lines += ["It does not fit. What would, each by itself:"]
        lines += [f"  - {sentence}" for sentence in plan.advice]
    else:
        has_memory = needs[0].memory is not None
        verdict = "It fits." if has_memory else "Whether that fits: --memory GB,GB,..."
        lines += [f"{verdict} To run it:", "", _command(plan.launch)]
    if workload.sequences > 1:
        lines += [
            f"(with --prompts-file FILE --batch-size {workload.sequences} for several "
            "sequences)"
        ]
    if plan.speeds:
        text = speeds_text(plan.speeds, plan.profiles, workload.context)
        lines += ["", text, *_warnings(plan)]
    else:
        lines += ["", f"Speeds: {plan.no_speeds}."]
    return "\n".join(map(_wrapped, "\n".join(lines).split("\n")))


def _warnings(plan: Plan) -> list[str]:
    """Of measured profiles whose numbers cannot be right."""
    return [
        f"WARNING: the profile {profile.name} is implausible, measure it again with "
        f"mlx_ep.calibrate: {problems[0]}"
        + (f"; and {len(problems) - 1} more" if len(problems) > 1 else "")
        for profile in {p.name: p for p in plan.profiles}.values()
        if (problems := implausible(profile))
    ]


def _wrapped(line: str) -> str:
    """A sentence in lines of 79 characters; tables and commands stay as they are."""
    if len(line) <= 79 or "  " in line.strip():
        return line
    indent = "    " if line.startswith("  - ") else ""
    return fill(line, 79, subsequent_indent=indent, break_long_words=False)


def _command(words: list[str]) -> str:
    """One command to copy, in lines that fit a terminal."""
    lines, line = [], "   "
    for word in map(shlex.quote, words):
        if len(line) + len(word) > 76:
            lines.append(line + " \\")
            line = "       "
        line += f" {word}"
    return "\n".join([*lines, line])


def plan_json(plan: Plan) -> dict[str, Any]:
    """Everything, for programs."""
    content = needs_json(plan.model, plan.needs, plan.workload)
    content["fits"] = plan.fits if plan.needs[0].memory is not None else None
    content["advice"] = plan.advice
    content["launch"] = plan.launch
    content["stages"] = [] if plan.stages is None else stages_json(plan.stages)
    content["profiles"] = [profile.name for profile in plan.profiles]
    content["predicted"] = [asdict(speed) for speed in plan.speeds]
    return content


def main() -> None:
    with cli.interruptible():
        _main()


def _main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        if args.json is not None and str(args.json) != "-":
            cli.check_output("--json", args.json)
        if args.write_placement is not None:
            cli.check_output("--write-placement", args.write_placement)
        check_picture_flags(args)
        check_stage_flags(args)
        check_load_flags(args)
        if args.simulate is not None:
            return print_load(make_load(args), args)
        plan = make_plan(args)
        if args.write_placement:
            with cli.whole_file(args.write_placement) as part:
                write_placement(part, plan.placement)
        if args.plot is not None:
            plot_record(args.plot, args.record, plan.placement)
    except ValueError as error:
        parser.error(str(error))
    if str(args.json) != "-":
        print(plan_text(plan, args.model))
    if args.json is not None:
        cli.write_json(args.json, plan_json(plan))
    if not plan.fits:
        sys.exit(1)


if __name__ == "__main__":
    main()
