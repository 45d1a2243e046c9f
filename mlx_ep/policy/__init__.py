"""What runs the experts of a model and moves its rows.

Measured at warm-up, the same on every rank.
"""

from mlx_ep.policy.agree import BACKEND_VARIABLE
from mlx_ep.policy.choose import (
    ExpertsPolicy,
    Measured,
    default_backend,
    default_movement,
    default_option,
    default_strategy,
)
from mlx_ep.policy.cost import (
    ARMS,
    LayerCost,
    StepCost,
    layer_cost,
    prefill_seconds,
    step_cost,
)
from mlx_ep.policy.explain import explain
from mlx_ep.policy.layer import Layer, Wish
from mlx_ep.policy.move import MovementPolicy
from mlx_ep.policy.profile import (
    Profile,
    find_profile,
    overridden,
    parse_settings,
    read_profile,
    shipped_profiles,
    write_profile,
)
from mlx_ep.policy.shape import LayerShape, ModelShape, named_layer
from mlx_ep.policy.tune import ModelPolicy, share_cores, tune
from mlx_ep.policy.warmup import TOLERANCE, Result, measure, reference, relative_error
from mlx_ep.policy.warmup_movement import MovementShape, measure_movement

__all__ = [
    "ExpertsPolicy",
    "Measured",
    "default_backend",
    "default_movement",
    "default_option",
    "default_strategy",
    "explain",
    "BACKEND_VARIABLE",
    "MovementPolicy",
    "MovementShape",
    "Layer",
    "ModelPolicy",
    "Wish",
    "share_cores",
    "tune",
    "TOLERANCE",
    "Result",
    "measure",
    "measure_movement",
    "reference",
    "relative_error",
    "ARMS",
    "LayerCost",
    "StepCost",
    "layer_cost",
    "prefill_seconds",
    "step_cost",
    "Profile",
    "find_profile",
    "overridden",
    "parse_settings",
    "read_profile",
    "shipped_profiles",
    "write_profile",
    "LayerShape",
    "ModelShape",
    "named_layer",
]
