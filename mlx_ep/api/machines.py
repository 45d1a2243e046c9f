"""What machines may differ in, and what follows from it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import mlx.core as mx

from mlx_ep.comm.symmetry import Facts
from mlx_ep.config import EPConfig

# Of the launcher, which gives each rank its own; and ours, of which rank 0's count.
_OWN_VARIABLES = (
    "MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_JACCL", "MLX_IBV", "MLX_MPI",
    "MLX_EP_",
)  # fmt: skip
_EVAL_LAYERS = 8  # between two evaluations of a prompt, on Metal


def machine_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """What may make this rank round differently than another, or run differently."""
    facts = {
        "mlx": version("mlx"),
        "machine": platform.machine(),
        "chip": str(mx.device_info().get("architecture")),
        "backend": "metal" if mx.metal.is_available() else "cpu",
    }
    for name in sorted(environ):
        if name.startswith("MLX_") and not name.startswith(_OWN_VARIABLES):
            facts[name] = environ[name]
    return facts


def shares_rank_0_routing(config: EPConfig, machines: Sequence[Facts]) -> bool:
    """Whether rank 0's routing is sent to all: where ranks may round differently.

    Args:
        machines: the facts of every rank.
    """
    if config.shared_routing != "auto":
        return config.shared_routing == "always"
    return any(machine != machines[0] for machine in machines)


def layers_between(config: EPConfig, machines: Sequence[Facts]) -> int:
    """MoE layers between two evaluations of a prompt; 0: there are none.

    All ranks evaluate alike, or their collectives could come in another order.
    """
    if config.eval_layers is not None or len(machines) == 1:
        return config.eval_layers or 0
    return _EVAL_LAYERS * any(each["backend"] == "metal" for each in machines)


def unlike(machines: Sequence[Facts]) -> str:
    """Who has what, in one line: ``chip: rank 0 M3, rank 1 M4; ...``; "": all alike."""
    names = dict.fromkeys(name for machine in machines for name in machine)
    found = []
    for name in names:
        values = [machine.get(name, "not set") for machine in machines]
        if len(set(values)) > 1:
            ranks = (f"rank {rank} {value}" for rank, value in enumerate(values))
            found.append(f"{name}: {', '.join(ranks)}")
    return "; ".join(found)
