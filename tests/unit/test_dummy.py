"""Dummy weights: their sizes are known before their numbers."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ep.loading.dummy import build_dummy, fill_dummy
from mlx_ep.placement import Placement
from tests.support import tiny


@pytest.mark.parametrize("has_metal", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_built_has_the_dtypes_that_are_filled(
    has_metal: bool, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: has_metal)
    config = dict(tiny.QWEN3_MOE)
    if bits is not None:
        config["quantization"] = {"group_size": 32, "bits": bits}
    placement = Placement.contiguous(config["num_experts"], 2)
    model = build_dummy(config, placement, 0)
    built = {name: array.dtype for name, array in tree_flatten(model.parameters())}
    fill_dummy(model, placement, 0)
    filled = {name: array.dtype for name, array in tree_flatten(model.parameters())}
    assert built == filled
