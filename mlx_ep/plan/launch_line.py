"""The command that runs what a plan says, and the memory of the hosts for it."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from mlx_ep.cli.hosts import Host, Hosts
from mlx_ep.loading.estimate import Workload

_ASK = "from mlx_ep.loading import memory_limit; print(memory_limit(None))"
_ASK_SECONDS = 60.0


def launch_line(
    args: argparse.Namespace, workload: Workload, num_ranks: int, context: int
) -> list[str]:
    """The words of a command that generates with a plan's placement.

    Args:
        args: plan's flags.
        workload: with the attention that was chosen.
        context: what --context has to be; 0: it is left out.
    """
    on = ["--hostfile", str(args.hostfile)] if args.hostfile else ["-n", str(num_ranks)]
    model = Path(args.model)
    name = str(model.parent) if model.name == "config.json" else args.model
    words = ["mlx_ep.launch", *on, "--", "mlx_ep.generate", "--model", name]
    words += ["--ranks", str(num_ranks)]
    if args.revision is not None:
        words += ["--revision", args.revision]
    if args.memory is not None:
        words += ["--memory", ",".join(f"{gb:g}" for gb in args.memory)]
        words += ["--context", str(context)] if context else []
    if args.replica_memory != "0":
        words += ["--replica-memory", args.replica_memory]
    if args.placement_file is not None:
        words += ["--placement", args.placement_file]
    if args.ep_size is not None:
        words += ["--ep", str(args.ep_size)]
    if args.pp > 1:
        words += ["--pp", str(args.pp)]
    words += ["--attention", workload.attention]
    words += ["--prefill-step-size", str(workload.step)]
    quantization = workload.quantization
    if quantization.kv_bits is not None:
        words += ["--kv-bits", str(quantization.kv_bits)]
        words += ["--kv-group-size", str(quantization.kv_group_size)]
        words += ["--quantized-kv-start", str(quantization.quantized_kv_start)]
    return words


def memory_of(hosts: Hosts) -> tuple[float, ...]:
    """GB (10^9 bytes) for each rank, as its host says; ranks of one host share it.

    Raises:
        ValueError: a host cannot be asked.
    """
    names = [host.ssh for host in hosts.ranks]
    limits = {host.ssh: _ask(host, hosts.env) for host in dict.fromkeys(hosts.ranks)}
    # Rounded down, so that what is planned is there.
    return tuple(limits[name] / names.count(name) // 1e6 / 1e3 for name in names)


def _ask(host: Host, env: tuple[str, ...]) -> int:
    if host.is_here:
        command = [sys.executable, "-c", _ASK]
    else:
        words = ["env", *env, "python3", "-c", _ASK]
        command = ["ssh", "-o", "BatchMode=yes", host.ssh, shlex.join(words)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        said, reason = "", str(error)
    else:
        said, reason = done.stdout.strip(), done.stderr
    if not said.isdecimal():
        raise ValueError(
            f"--hostfile: the memory of {host.ssh} must be known, and asking it failed "
            f"({' '.join(reason.split())[-200:]}). Give it with --memory, or put the "
            'PATH of its environment into "envs".'
        )
    return int(said)
