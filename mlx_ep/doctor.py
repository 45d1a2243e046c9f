"""Check this machine or cluster: ``mlx_ep.doctor``.

Every kernel against its twin on this GPU, every way to run experts against float32,
and, on several ranks, the collectives against NumPy; each with its time. The exit code
is 1 where anything disagrees.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import mlx.core as mx

import mlx_ep
from mlx_ep import cli
from mlx_ep.comm import Comm, gather_objects
from mlx_ep.measure import Check, check_collectives, check_experts, check_kernels
from mlx_ep.metrics import aligned
from mlx_ep.rows import uses_metal
from mlx_ep.tune import share_cores

# Numbers that a rank contributes to a collective, times the number of ranks.
COLLECTIVE_SIZES = (64, 1 << 17)
# What a launcher or a user may have set, and what it does.
RISKY_VARIABLES = {
    "MLX_METAL_FAST_SYNCH": "with several ranks it can hang the GPU until the Mac "
    "restarts; unset it",
    "MLX_EP_BACKEND": "it forces what runs the experts",
}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="mlx_ep.doctor",
        description="Check kernels, experts and collectives on this machine, or on "
        "every rank that the launcher started (mlx.launch -n 2 -- mlx_ep.doctor). "
        "Exit code 1: something disagrees.",
    )
    cli.add_ranks_flag(parser)
    return parser


def examine(comm: Comm) -> bool:
    """Check everything, print it on rank 0; whether all is right, on every rank."""
    facts = gather_objects(comm, machine(comm))
    if comm.rank == 0:
        print("\n".join(line for rank in facts for line in _machine_lines(rank)))
        print(_environment_lines(facts), end="", flush=True)
    share_cores(comm)
    kernels = list(check_kernels()) if uses_metal() else []
    experts = list(check_experts())
    collectives = []
    if comm.size > 1:
        sizes = [size * comm.size for size in COLLECTIVE_SIZES]
        collectives = list(check_collectives(comm, sizes))
    found = gather_objects(comm, [asdict(c) for c in kernels + experts + collectives])
    checks = [[Check(**values) for values in rank] for rank in found]
    if comm.rank == 0:
        for rank, report in enumerate(checks):
            print(f"\nrank {rank}\n{report_table(report)}")
        print(f"\n{_verdict(facts, checks)}", flush=True)
    return not any(is_wrong(check) for rank in checks for check in rank)


def is_wrong(check: Check) -> bool:
    """Whether it must not be relied on; MLX's own precision is only reported."""
    return check.is_ours and not check.is_right


def machine(comm: Comm) -> dict[str, Any]:
    """What this rank runs on; anything JSON can hold."""
    packages = ("mlx", "mlx-lm", "numpy")
    device = mx.device_info()
    return {
        "rank": comm.rank,
        "size": comm.size,
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "mlx_ep": mlx_ep.__version__,
        "chip": str(device.get("device_name", platform.machine())),
        "metal": uses_metal(),
        "transport": comm.transport,
        "variables": {
            name: os.environ[name] for name in RISKY_VARIABLES if os.environ.get(name)
        },
    }


def _machine_lines(rank: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {v}" for name, v in rank["versions"].items())
    gpu = (
        "computes on the GPU through Metal" if rank["metal"] else "computes on the CPU"
    )
    return [
        f"rank {rank['rank']} of {rank['size']}: {rank['host']}, {rank['chip']}, "
        f"{rank['system']}, {gpu}; transport {rank['transport']}",
        f"  mlx_ep {rank['mlx_ep']}, {versions}, Python {rank['python']}",
    ]


def _environment_lines(facts: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for rank in facts:
        for name, value in rank["variables"].items():
            if value != "0":
                where = f"{name}={value} on rank {rank['rank']}"
                lines.append(f"WARNING: {where}: {RISKY_VARIABLES[name]}.\n")
    if len({str(rank["versions"]) + rank["mlx_ep"] for rank in facts}) > 1:
        lines.append("WARNING: the ranks have different versions.\n")
    return "".join(lines)


def report_table(checks: Sequence[Check]) -> str:
    """One line a check: difference, what is allowed, times, verdict."""
    rows = [("check", "difference", "allowed", "ms", "plain ms", "GB/s", "")]
    for check in checks:
        plain = check.plain_seconds
        rate = check.num_bytes / check.seconds / 1e9 if check.seconds else 0.0
        rows.append(
            (
                check.what,
                f"{check.error:.1e}",
                f"{check.tolerance:.1e}",
                f"{check.seconds * 1e3:.3f}" if check.seconds else "-",
                "-" if plain is None else f"{plain * 1e3:.3f}",
                f"{rate:.2f}" if check.num_bytes else "-",
                _word(check),
            )
        )
    return aligned(rows, left=(0, len(rows[0]) - 1))


def _word(check: Check) -> str:
    if check.is_right:
        return "ok"
    if not check.is_ours:
        return "MLX's own, imprecise: not used"
    return f"WRONG: {check.why}" if check.why else "WRONG"


def _verdict(
    facts: Sequence[Mapping[str, Any]], checks: Sequence[Sequence[Check]]
) -> str:
    """What was found, and what could not be checked."""
    lines = []
    without = [str(rank["rank"]) for rank in facts if not rank["metal"]]
    if without:
        lines.append(
            f"Not checked: the Metal kernels on rank {', '.join(without)}, where MLX "
            "does not compute on a GPU through Metal. They are not used there either."
        )
    if len(facts) == 1:
        lines.append(
            "Not checked: collectives, as there is one rank. Start several with "
            "mlx.launch -n 2 -- mlx_ep.doctor, or on the hosts of your cluster."
        )
    wrong = [
        f"rank {r}: {check.what}"
        for r, found in enumerate(checks)
        for check in found
        if is_wrong(check)
    ]
    count = sum(check.is_ours or check.is_right for found in checks for check in found)
    if wrong:
        lines.append(f"{len(wrong)} of {count} checks disagree: {'; '.join(wrong)}.")
    else:
        lines.append(f"All {count} checks agree.")
    return "\n".join(lines)


def main() -> None:
    is_right = True

    def body(args: argparse.Namespace, comm: Comm) -> None:
        nonlocal is_right
        is_right = examine(comm)

    cli.run(make_parser(), body)
    if not is_right:
        sys.exit(1)


if __name__ == "__main__":
    main()
