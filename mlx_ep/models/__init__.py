"""The MoE blocks of mlx-lm models, found by structure and made expert-parallel."""

from mlx_ep.models.block_form import BlockForm, find_forms
from mlx_ep.models.blocks import BlockState, build_kernels, install
from mlx_ep.models.families import (
    FAMILIES,
    Family,
    stack_experts,
    stack_quantization,
    stack_shape,
    stack_tensors,
    why_not_here,
)
from mlx_ep.models.host_linear import compute_on_host
from mlx_ep.models.pipeline import (
    check_hidden_states,
    connect_stages,
    keep_layers,
    layer_list,
    without_other_layers,
)
from mlx_ep.models.sites import MoESite, find_moe_sites, keep_experts
from mlx_ep.models.tensor_names import ExpertTensor, expert_tensor
from mlx_ep.models.tensor_parallel import shard_problem, tensor_problem

__all__ = [
    "BlockForm",
    "BlockState",
    "FAMILIES",
    "ExpertTensor",
    "Family",
    "MoESite",
    "build_kernels",
    "check_hidden_states",
    "compute_on_host",
    "connect_stages",
    "expert_tensor",
    "find_forms",
    "find_moe_sites",
    "install",
    "keep_experts",
    "keep_layers",
    "layer_list",
    "shard_problem",
    "stack_experts",
    "stack_quantization",
    "stack_shape",
    "stack_tensors",
    "tensor_problem",
    "why_not_here",
    "without_other_layers",
]
