"""What runs the experts of a model and moves its rows: checked, timed and chosen.

One machinery: a `Problem` has options and a float32 reference (`experts`, `movement`);
each rank measures them (`check`), all ranks agree on a `Choice` (`agree`, `choose`),
and `explain` says why.
"""

from mlx_ep.tune.agree import BACKEND_VARIABLE, agree, facts
from mlx_ep.tune.check import Finding, measure
from mlx_ep.tune.choose import (
    Choice,
    default_backend,
    default_movement,
    default_option,
)
from mlx_ep.tune.experts import TOLERANCE, ExpertsProblem, Layer, reference
from mlx_ep.tune.explain import explain
from mlx_ep.tune.movement import MovementProblem, MovementShape
from mlx_ep.tune.problem import Problem
from mlx_ep.tune.threads import BlasThreads, choose_threads, share_cores
from mlx_ep.tune.timing import in_turn, seconds_of
from mlx_ep.tune.tune import ModelPolicy, MovementPolicy, Wish, tune

__all__ = [
    "BACKEND_VARIABLE",
    "agree",
    "facts",
    "Finding",
    "measure",
    "Choice",
    "default_backend",
    "default_movement",
    "default_option",
    "TOLERANCE",
    "ExpertsProblem",
    "Layer",
    "reference",
    "explain",
    "MovementProblem",
    "MovementShape",
    "Problem",
    "BlasThreads",
    "choose_threads",
    "in_turn",
    "seconds_of",
    "ModelPolicy",
    "MovementPolicy",
    "Wish",
    "share_cores",
    "tune",
]
