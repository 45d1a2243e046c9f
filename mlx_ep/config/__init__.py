"""How a model is made expert-parallel: one record, and the names that it takes."""

from mlx_ep.config.flag import Flag, Setting
from mlx_ep.config.record import EPConfig, OverlapMode, RunnerName, settings
from mlx_ep.config.strategies import (
    ALIASES,
    AllToAllMode,
    StrategyName,
    allow_strategy,
)

__all__ = [
    "ALIASES",
    "AllToAllMode",
    "EPConfig",
    "Flag",
    "OverlapMode",
    "RunnerName",
    "Setting",
    "StrategyName",
    "allow_strategy",
    "settings",
]
