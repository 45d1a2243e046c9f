"""A MoE layer over the ranks of a group: router, group, the layer itself."""

from mlx_ep.moe.group import ExpertGroup, Step
from mlx_ep.moe.layer import MixtureOfExperts
from mlx_ep.moe.moving import move_slots
from mlx_ep.moe.rebalance import Rebalancer, RebalanceRule
from mlx_ep.moe.recorder import RoutingRecorder
from mlx_ep.moe.router import TopKRouter

__all__ = [
    "ExpertGroup",
    "MixtureOfExperts",
    "RebalanceRule",
    "Rebalancer",
    "RoutingRecorder",
    "Step",
    "TopKRouter",
    "move_slots",
]
