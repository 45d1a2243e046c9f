"""Names and shapes in checkpoints: what is a stack of experts, what only looks so."""

from __future__ import annotations

import pytest
from mlx.utils import tree_flatten

from mlx_ep.models import expert_tensor, find_moe_sites, stack_experts, stack_shape
from tests.support.architectures import ARCHITECTURES, make_model
from tests.support.hub_layouts import HUB_LAYOUTS

E = 10


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        # Rows of a router and its bias, as many as experts.
        ("model.layers.3.mlp.gate.weight", (E, 64)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (E,)),
        ("model.layers.3.mlp.experts.e_score_correction_bias", (E,)),  # laguna
        ("model.layers.3.mlp.expert_bias", (E,)),
        # One norm for all experts, of a width that is E by chance (muse_spark).
        ("model.language_model.layers.3.mlp.experts.post_expert_norm.weight", (E,)),
        # A stack of output groups and not of experts (deepseek_v41).
        ("model.layers.3.self_attn.o_a_proj.weight", (E, 8, 16)),
        ("layers.3.attn.wo_a.weight", (E, 8, 16)),
        # Shared experts, of a width that is E by chance.
        ("model.layers.3.mlp.shared_experts.up_proj.weight", (E, 64)),
        ("model.layers.3.mlp.shared_expert_gate.weight", (E, 64)),
        # Conversions of minimax_m3 that append the shared expert to the others.
        ("model.layers.3.block_sparse_moe.switch_mlp.up_proj.weight", (E + 1, 32, 64)),
        # dbrx on the hub, as long as it has no axis for the experts.
        ("transformer.blocks.3.ffn.experts.mlp.w1", (E * 32, 64)),
    ],
)
def test_what_is_no_stack_of_experts(name: str, shape: tuple[int, ...]) -> None:
    assert expert_tensor(name, shape, E) is None


@pytest.mark.parametrize("name", ["w1", "v1", "w2"])
def test_a_stack_without_an_axis_gets_one(name: str) -> None:
    full = f"transformer.blocks.3.ffn.experts.mlp.{name}"
    shape = stack_shape(ARCHITECTURES["dbrx"], full, (E * 32, 64))
    assert shape == (E, 32, 64)
    found = expert_tensor(full, shape, E)
    assert found is not None
    assert found.expert is None
    assert stack_shape(ARCHITECTURES["qwen3_moe"], full, (E * 32, 64)) == (E * 32, 64)


@pytest.mark.parametrize("name", ["deepseek_v41", "laguna", "minimax_m3_vl", "dbrx"])
def test_experts_and_nothing_else_are_told_from_names(name: str) -> None:
    """In the hub's layout, what is sliced is what mlx-lm makes its experts of."""
    model = make_model(ARCHITECTURES[name])
    tensors = HUB_LAYOUTS[name](dict(tree_flatten(model.parameters())))
    sliced = sum(
        tensor.nbytes
        for key, tensor in tensors.items()
        if expert_tensor(key, stack_shape(ARCHITECTURES[name], key, tensor.shape), E)
    )
    sites = find_moe_sites(stack_experts(model))
    assert all("attn" not in site.path for site in sites)
    assert sliced == sum(
        parameter.nbytes
        for site in sites
        for projection in site.projections
        for parameter in projection.parameters().values()
    )
