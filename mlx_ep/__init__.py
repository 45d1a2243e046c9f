"""Expert parallelism (EP) for the Mixture-of-Experts models of mlx-lm.

    import mlx_ep
    model, tokenizer = mlx_ep.load("mlx-community/Qwen3-30B-A3B-4bit")

The names below are imported when they are first used, so that importing the package
does nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlx_ep.api import load, parallelize
    from mlx_ep.comm import GroupComm, all_to_all
    from mlx_ep.comm.liveness import guard
    from mlx_ep.config import EPConfig
    from mlx_ep.exchange import (
        STRATEGIES,
        moe_combine_exchange,
        moe_dispatch_exchange,
    )
    from mlx_ep.moe import MixtureOfExperts, TopKRouter
    from mlx_ep.placement import Placement
    from mlx_ep.rows import get_dispatch_layout
    from mlx_ep.types import Routing, Rows

_HOMES = {
    "load": "mlx_ep.api",
    "parallelize": "mlx_ep.api",
    "EPConfig": "mlx_ep.config",
    "guard": "mlx_ep.comm.liveness",
    "MixtureOfExperts": "mlx_ep.moe",
    "TopKRouter": "mlx_ep.moe.router",
    "Routing": "mlx_ep.types",
    "Rows": "mlx_ep.types",
    "Placement": "mlx_ep.placement",
    "moe_dispatch_exchange": "mlx_ep.exchange",
    "moe_combine_exchange": "mlx_ep.exchange",
    "get_dispatch_layout": "mlx_ep.rows.pack",
    "STRATEGIES": "mlx_ep.exchange",
    "GroupComm": "mlx_ep.comm",
    "all_to_all": "mlx_ep.comm",
}

__all__ = [
    "load",
    "parallelize",
    "EPConfig",
    "guard",
    "MixtureOfExperts",
    "TopKRouter",
    "Routing",
    "Rows",
    "Placement",
    "moe_dispatch_exchange",
    "moe_combine_exchange",
    "get_dispatch_layout",
    "STRATEGIES",
    "GroupComm",
    "all_to_all",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlx_ep' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
