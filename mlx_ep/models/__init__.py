"""The MoE blocks of mlx-lm models, found by structure and made expert-parallel."""

from mlx_ep.models.blocks import (
    MoESite,
    find_moe_sites,
    install,
    keep_experts,
    verify_blocks,
)
from mlx_ep.models.tensor_names import ExpertTensor, expert_tensor

__all__ = [
    "ExpertTensor",
    "MoESite",
    "expert_tensor",
    "find_moe_sites",
    "install",
    "keep_experts",
    "verify_blocks",
]
