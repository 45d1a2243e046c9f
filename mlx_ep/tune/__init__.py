"""What runs the experts of a model and moves its rows: checked, timed and chosen.

Measured at warm-up, the same on every rank.
"""

from mlx_ep.tune.agree import BACKEND_VARIABLE
from mlx_ep.tune.choose import (
    ExpertsPolicy,
    Measured,
    default_backend,
    default_movement,
    default_option,
    default_strategy,
)
from mlx_ep.tune.explain import explain
from mlx_ep.tune.layer import Layer, Wish
from mlx_ep.tune.move import MovementPolicy
from mlx_ep.tune.tune import ModelPolicy, share_cores, tune
from mlx_ep.tune.warmup import TOLERANCE, Result, measure, reference, relative_error
from mlx_ep.tune.warmup_movement import MovementShape, measure_movement

__all__ = [
    "BACKEND_VARIABLE",
    "ExpertsPolicy",
    "Measured",
    "default_backend",
    "default_movement",
    "default_option",
    "default_strategy",
    "explain",
    "Layer",
    "Wish",
    "MovementPolicy",
    "ModelPolicy",
    "share_cores",
    "tune",
    "TOLERANCE",
    "Result",
    "measure",
    "reference",
    "relative_error",
    "MovementShape",
    "measure_movement",
]
