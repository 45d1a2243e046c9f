"""A profile and shapes of round numbers, for costs computed by hand."""

from __future__ import annotations

from mlx_ep.cost.profile import Profile
from mlx_ep.cost.records import Link
from mlx_ep.cost.shape import LayerShape, MatrixTotal, ModelShape
from mlx_ep.types import Packing

JACCL = Link(transport="jaccl", topology="mesh", latency=30e-6, bandwidth=6e9)
RING = Link(transport="ring", topology="ring", latency=100e-6, bandwidth=1e9)
# Round numbers: nothing is fixed but what a test asks for.
PROFILE = Profile(
    name="round",
    memory_bandwidth=1e9,
    copy_bandwidth=1e12,
    matmul_rate=1e12,
    expert_rate=1e12,
    unsorted_rate=1e12,
    attention_rate=1e12,
    block_seconds=0.0,
    layer_seconds=0.0,
    step_seconds=0.0,
    element_seconds=0.0,
    route_seconds=0.0,
    sync_seconds=0.0,
    memory_bytes=1e12,
    links={"jaccl": JACCL, "ring": RING},
)
LAYER = LayerShape(
    num_experts=8,
    width=100,
    expert_width=50,
    top_k=2,
    expert_bytes=10_000,
    packing=Packing.affine(4),
)
MODEL = ModelShape(
    layer=LAYER,
    num_layers=3,
    num_moe_layers=2,
    attention=MatrixTotal(30_000, 60_000, 20_000),
    dense=MatrixTotal(15_000, 30_000, 15_000),
    head=MatrixTotal(10_000, 20_000),
    kv_bytes=400,
    attention_macs=200,
)
