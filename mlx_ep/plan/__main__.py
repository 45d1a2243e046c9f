"""What every rank would hold, where it does not fit, and how fast it would be.

One process, no launcher: sizes come from config.json and the headers of weight files.
The exit code is 1 where a rank's memory is too small.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_ep.loading.caches import cache_growth
from mlx_ep.loading.estimate import rank_outline
from mlx_ep.loading.sizes import held_bytes
from mlx_ep.metrics import format_bytes
from mlx_ep.placement import Placement, write_placement
from mlx_ep.plan.build import Plan, make_plan
from mlx_ep.plan.flags import make_parser
from mlx_ep.plan.load import check_load_flags, make_load, print_load
from mlx_ep.plan.report import needs_json, needs_table, workload_lines
from mlx_ep.plan.speeds import speeds_text


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
    ]
    if needs[0].memory is None:
        lines += ["Whether that fits: --memory with the GB of each rank."]
    elif plan.fits:
        lines += [f"It fits. Run with: {_run_flags(plan)}"]
    else:
        lines += ["It does not fit. What would, each by itself:"]
        lines += [f"  - {sentence}" for sentence in plan.advice]
    if plan.speeds:
        text = speeds_text(plan.speeds, plan.profiles, workload.context)
        lines += ["", text]
    else:
        lines += ["", f"Speeds: {plan.no_speeds}."]
    return "\n".join(lines)


def _run_flags(plan: Plan) -> str:
    memory = ",".join(f"{(need.memory or 0) / 1e9:g}" for need in plan.needs)
    return (
        f"--memory {memory} --context {plan.workload.context} "
        f"--attention {plan.workload.attention}"
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """Everything, for programs."""
    content = needs_json(plan.model, plan.needs, plan.workload)
    content["fits"] = plan.fits if plan.needs[0].memory is not None else None
    content["advice"] = plan.advice
    content["profiles"] = [profile.name for profile in plan.profiles]
    content["predicted"] = [asdict(speed) for speed in plan.speeds]
    return content


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        check_load_flags(args)
        if args.simulate is not None:
            return print_load(make_load(args), args.json)
        plan = make_plan(args)
        if args.write_placement:
            write_placement(args.write_placement, plan.placement)
    except ValueError as error:
        parser.error(str(error))
    print(plan_text(plan, args.model))
    if args.json:
        Path(args.json).write_text(json.dumps(plan_json(plan), indent=2) + "\n")
    if not plan.fits:
        sys.exit(1)


if __name__ == "__main__":
    main()
