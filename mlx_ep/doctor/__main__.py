"""``mlx_ep.doctor`` and ``python -m mlx_ep.doctor``.

Every kernel against its twin on this GPU, every way to run experts against float32,
tokens against one process, and, on several ranks, the collectives against NumPy and
every link; each with its time. The exit code is 1 where anything disagrees.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from mlx_ep import cli
from mlx_ep.api import prepare
from mlx_ep.comm import Comm, GroupComm, agreed, gather_objects
from mlx_ep.config import EPConfig
from mlx_ep.doctor.answers import answers, is_wrong
from mlx_ep.doctor.facts import machine, unlike
from mlx_ep.doctor.report import (
    answer_lines,
    environment_lines,
    link_table,
    machine_lines,
    report_table,
    verdict,
)
from mlx_ep.doctor.tokens import check_tokens
from mlx_ep.loading import find_model
from mlx_ep.measure import Check, check_collectives, check_experts, check_kernels
from mlx_ep.measure.links import measure_links
from mlx_ep.rows import uses_metal
from mlx_ep.tune import share_cores

# Numbers that a rank contributes to a collective, times the number of ranks.
COLLECTIVE_SIZES = (64, 1 << 17)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="mlx_ep.doctor",
        description="Check kernels, experts, tokens, collectives and links on this "
        "machine, or on every rank that the launcher started (mlx_ep.launch -n 2 -- "
        "mlx_ep.doctor). Exit code 1: something disagrees.",
    )
    cli.add_ranks_flag(parser)
    parser.add_argument(
        "--model",
        type=cli.not_empty,
        help="Compare the files of this model too, over all ranks, and whether it "
        "fits; no weight is read.",
    )
    cli.add_json_flag(parser, "everything")
    return parser


def examine(args: argparse.Namespace, comm: GroupComm) -> bool:
    """Check everything, say it on rank 0; whether all is right, on every rank."""
    out = cli.beside(args)

    def say(*lines: str) -> None:
        if comm.rank == 0:
            print("\n".join(lines), file=out, flush=True)

    facts = gather_objects(comm, machine(comm))
    table = unlike(facts)
    hosts = [rank["host_id"] for rank in facts]
    for rank in facts:
        say(*machine_lines(rank, sharing=hosts.count(rank["host_id"])))
    if lines := environment_lines(facts, table):
        say(*lines)
    links = measure_links(comm, hosts)
    if links:
        say("", link_table(links))
    problem = model_problem(args.model, comm)
    found = gather_objects(comm, [asdict(check) for check in _checks(comm)])
    checks = [[Check(**values) for values in rank] for rank in found]
    for rank, report in enumerate(checks):
        say("", f"rank {rank}", report_table(report))
    said = answers(facts, checks, links, problem)
    say(*answer_lines(said), "", verdict(facts, checks, problem))
    if comm.rank == 0 and args.json is not None:
        record = {
            "ranks": facts,
            "not_alike": table,
            "links": [asdict(link) | {"is_slow": link.is_slow} for link in links],
            "model": args.model,
            "model_problem": problem,
            "checks": [[_json(check) for check in rank] for rank in checks],
            "answers": said,
            "is_right": not _any_wrong(checks, problem),
        }
        cli.write_json(args.json, record)
    return not _any_wrong(checks, problem)


def model_problem(model: str | None, comm: Comm) -> str:
    """Why a model cannot be loaded on these ranks, alike on every rank, or ""."""
    if model is None:
        return ""
    try:
        prepare(model, comm, EPConfig())
    except ValueError as error:
        return str(error)
    return ""


def _checks(comm: Comm) -> list[Check]:
    share_cores(comm)
    found = list(check_kernels()) if uses_metal() else []
    found += check_experts()
    found.append(check_tokens(comm))
    if comm.size > 1:
        sizes = [size * comm.size for size in COLLECTIVE_SIZES]
        found += check_collectives(comm, sizes)
    return found


def _any_wrong(checks: list[list[Check]], problem: str) -> bool:
    return bool(problem) or any(is_wrong(check) for rank in checks for check in rank)


def _json(check: Check) -> dict[str, Any]:
    """NaN is no JSON."""
    values = asdict(check) | {"is_right": check.is_right}
    return values | {"error": check.error if check.error == check.error else None}


def main() -> None:
    is_right = True

    def body(args: argparse.Namespace, comm: Comm) -> None:
        nonlocal is_right
        assert isinstance(comm, GroupComm)
        with cli.usage_errors():
            cli.check_outputs(args, comm)
            if args.model is not None:  # a wrong name is no finding
                agreed(comm, lambda: find_model(args.model, None, download="ranges"))
        is_right = examine(args, comm)

    cli.run(make_parser(), body)
    if not is_right:
        sys.exit(1)


if __name__ == "__main__":
    main()
