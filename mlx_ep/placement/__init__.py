"""Where each expert lives."""

from mlx_ep.placement.balance import rebalance_experts
from mlx_ep.placement.choice import DECODE_TOKENS, ReplicaChoice
from mlx_ep.placement.everywhere import check_everywhere, everywhere
from mlx_ep.placement.file import read_placement, write_placement
from mlx_ep.placement.fill import with_replicas
from mlx_ep.placement.improve import Improved, improve
from mlx_ep.placement.load import LayerLoad, draw_steps, expected_busiest
from mlx_ep.placement.moves import Moves, keep_slots
from mlx_ep.placement.parts import Part, runs
from mlx_ep.placement.placement import Placement
from mlx_ep.placement.record import (
    RecordedRouting,
    is_record,
    read_record,
    write_record,
)
from mlx_ep.placement.replicas import (
    Balanced,
    RankRoom,
    balance,
    balance_while_it_pays,
)
from mlx_ep.placement.served import served_counts
from mlx_ep.placement.shares import ExpertSizes, apportion, place
from mlx_ep.placement.stages import StageLayers, check_stages, cut_stages

__all__ = [
    "DECODE_TOKENS",
    "Balanced",
    "ExpertSizes",
    "Improved",
    "LayerLoad",
    "Moves",
    "Part",
    "Placement",
    "RankRoom",
    "RecordedRouting",
    "ReplicaChoice",
    "StageLayers",
    "apportion",
    "balance",
    "balance_while_it_pays",
    "check_everywhere",
    "check_stages",
    "cut_stages",
    "draw_steps",
    "everywhere",
    "expected_busiest",
    "improve",
    "is_record",
    "keep_slots",
    "place",
    "read_placement",
    "read_record",
    "rebalance_experts",
    "runs",
    "served_counts",
    "with_replicas",
    "write_placement",
    "write_record",
]
