"""What muse_spark has as Metal kernels only, in plain MLX, so that it runs on a CPU.

For tests: the model around the kernels is mlx-lm's, on both sides of a comparison. On
Metal nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx_lm.models.muse_spark as muse_spark

# The architectures that need it here.
STAND_INS = () if mx.metal.is_available() else ("muse_spark",)


@contextmanager
def metal_stand_in() -> Iterator[None]:
    """Run muse_spark's kernels in MLX for a while, where there is no Metal."""
    if mx.metal.is_available():
        yield
        return
    before = {name: getattr(muse_spark, name) for name in _FUNCTIONS}
    for name, function in _FUNCTIONS.items():
        setattr(muse_spark, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(muse_spark, name, function)


def _normed(x: mx.array, eps: float) -> mx.array:
    """``x / rms(x)`` along the last axis, in float32."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt(x.square().mean(axis=-1, keepdims=True) + eps)


def _expert_routing(
    logits: mx.array,
    expert_bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> tuple[mx.array, mx.array]:
    """Sigmoid scores; the bias counts for the choice only; in descending order."""
    scores = mx.sigmoid(logits.astype(mx.float32) * multiplier)
    ids = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    chosen = mx.take_along_axis(scores, ids, axis=-1)
    total = chosen.sum(axis=-1, keepdims=True)
    return ids.astype(mx.uint32), chosen / (total + score_eps) * route_scale


def _post_expert_norm_combine(
    experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
) -> mx.array:
    """Each expert's output scaled and normed, then their weighted sum."""
    outputs = _normed(experts.astype(mx.float32) * norm_weight, eps)
    return (outputs * weights[..., None]).sum(axis=-2).astype(experts.dtype)


def _qk_norm(
    qkvg: mx.array,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    query_scale: float,
) -> tuple[mx.array, mx.array]:
    """The normed heads ``[..., H, head_dim]`` of queries and keys."""
    queries, keys = (
        _normed(part.reshape(*part.shape[:-1], -1, head_dim), eps).astype(qkvg.dtype)
        for part in mx.split(
            qkvg[..., : (n_heads + n_kv_heads) * head_dim],
            [n_heads * head_dim],
            axis=-1,
        )
    )
    return (queries * query_scale).astype(qkvg.dtype), keys


def _qk_norm_rope(
    qkvg: mx.array, *, rope_base: float, offset: int, **norm: Any
) -> tuple[mx.array, ...]:
    """`_qk_norm`, and both rotated."""

    def rotated(heads: mx.array) -> mx.array:
        heads = mx.fast.rope(
            heads.swapaxes(1, 2),
            norm["head_dim"],
            traditional=True,
            base=rope_base,
            scale=1.0,
            offset=offset,
        )
        return heads.swapaxes(1, 2)

    return tuple(map(rotated, _qk_norm(qkvg, **norm)))


def _rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    """``[B, H, L, D] -> [B, L, H * D]``."""
    normed = _normed(x, eps).swapaxes(1, 2).reshape(gate.shape)
    return (normed * mx.sigmoid(gate.astype(mx.float32))).astype(x.dtype)


def _norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: Any,
) -> tuple[mx.array, mx.array | None]:
    """The stream with the normed branch, and its norm for the next block."""
    dtype = branch.dtype
    scaled = branch if post_weight is None else (post_weight * branch).astype(dtype)
    added = _normed(scaled, post_eps).astype(dtype).astype(mx.float32)
    stream = alpha * stream + beta * added
    if next_norm is None:
        return stream, None
    return stream, _pre_norm(stream, next_norm, dtype=dtype)


def _pre_norm(stream: mx.array, norm: Any, *, dtype: mx.Dtype) -> mx.array:
    return (_normed(stream, norm.eps) * norm.weight).astype(dtype)


_FUNCTIONS = {
    "expert_routing": _expert_routing,
    "norm_add_norm": _norm_add_norm,
    "post_expert_norm_combine": _post_expert_norm_combine,
    "pre_norm": _pre_norm,
    "qk_norm": _qk_norm,
    "qk_norm_rope": _qk_norm_rope,
    "rms_norm_sigmoid_gate": _rms_norm_sigmoid_gate,
}
