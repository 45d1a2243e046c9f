"""In what order a layer's work is queued with `--overlap single`, and without."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import mlx_ep
from mlx_ep.config import EPConfig
from tests.support import tiny


def started(monkeypatch, overlap: str) -> tuple[list[str], mx.array]:
    """What one block starts, in order, and its output."""
    model = mlx_ep.parallelize(
        tiny.make_model(tiny.QWEN2_MOE), config=EPConfig(overlap=overlap)
    )
    block = model.layers[0].mlp
    x = mx.random.normal((1, 5, 64), key=mx.random.key(3))
    order: list[str] = []
    queue, shared = mx.async_eval, type(block.shared_expert).__call__

    def queued(*arrays: mx.array) -> None:
        order.append(f"queued {arrays[0].shape}")
        queue(*arrays)

    def built(self, x):
        order.append("shared experts built")
        return shared(self, x)

    monkeypatch.setattr(mx, "async_eval", queued)
    monkeypatch.setattr(type(block.shared_expert), "__call__", built)
    output = block(x)
    order.append("block done")
    mx.eval(output)
    return order, output


def test_the_sum_is_queued_before_the_shared_experts(monkeypatch) -> None:
    with monkeypatch.context() as patch:
        order, output = started(patch, "single")
    assert order == [
        "queued (1, 5, 64)",  # the experts of this rank and the sum over ranks
        "shared experts built",
        "queued (1, 5, 64)",  # the shared experts, behind what the sum waits for
        "block done",
    ]
    with monkeypatch.context() as patch:
        lazy, plain = started(patch, "none")
    assert lazy == ["shared experts built", "block done"]
    np.testing.assert_array_equal(np.array(output), np.array(plain))
