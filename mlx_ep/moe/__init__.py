"""A MoE layer over the ranks of a group: router, group, the layer itself."""

from mlx_ep.moe.group import ExpertGroup
from mlx_ep.moe.layer import MixtureOfExperts
from mlx_ep.moe.moving import move_slots
from mlx_ep.moe.overlap import OverlapMode
from mlx_ep.moe.rebalance import Rebalancer, RebalanceRule
from mlx_ep.moe.recorder import RoutingRecorder
from mlx_ep.moe.router import TopKRouter
from mlx_ep.moe.step import Step

__all__ = [
    "ExpertGroup",
    "MixtureOfExperts",
    "OverlapMode",
    "RebalanceRule",
    "Rebalancer",
    "RoutingRecorder",
    "Step",
    "TopKRouter",
    "move_slots",
]
