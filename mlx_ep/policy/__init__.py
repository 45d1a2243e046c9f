"""What runs the experts of a model: measured at warm-up, the same on every rank."""

from mlx_ep.policy.choose import (
    ExpertsPolicy,
    Measured,
    default_backend,
    default_option,
    default_strategy,
)
from mlx_ep.policy.explain import explain
from mlx_ep.policy.tune import (
    BACKEND_VARIABLE,
    Layer,
    ModelPolicy,
    Wish,
    share_cores,
    tune,
)
from mlx_ep.policy.warmup import TOLERANCE, Result, measure, reference, relative_error

__all__ = [
    "ExpertsPolicy",
    "Measured",
    "default_backend",
    "default_option",
    "default_strategy",
    "explain",
    "BACKEND_VARIABLE",
    "Layer",
    "ModelPolicy",
    "Wish",
    "share_cores",
    "tune",
    "TOLERANCE",
    "Result",
    "measure",
    "reference",
    "relative_error",
]
