"""How weights are packed: one record, from a module, to a text and back."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_ep.types import MXFP4, MXFP8, Packing


def quantized(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> nn.Module:
    linear = nn.Linear(128, 64, bias=False)
    linear.set_dtype(dtype)
    return linear.to_quantized(group_size, bits, mode=mode)


MODULES = {
    "affine 4 bit/64 bfloat16": ("affine", 4, 64, mx.bfloat16),
    "affine 8 bit/32 float32": ("affine", 8, 32, mx.float32),
    "mxfp4 4 bit/32 uint8": ("mxfp4", 4, 32, mx.float32),
    "mxfp8 8 bit/32 uint8": ("mxfp8", 8, 32, mx.float32),
    "nvfp4 4 bit/16 uint8": ("nvfp4", 4, 16, mx.float32),
}


@pytest.mark.parametrize("text", MODULES)
def test_of_a_quantized_module(text: str) -> None:
    module = quantized(*MODULES[text])
    packing = Packing.of(module)
    assert str(packing) == text and Packing.parse(text) == packing
    assert packing.is_packed
    # Bytes as MLX holds them.
    held = sum(array.nbytes for array in module.parameters().values())
    assert packing.num_bytes(128 * 64) == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_of_a_plain_module(dtype: str) -> None:
    switch = SwitchLinear(8, 4, 2, bias=False)
    switch.set_dtype(getattr(mx, dtype))
    packing = Packing.of(switch)
    assert packing == Packing.plain(dtype) == Packing.parse(dtype)
    assert str(packing) == dtype and not packing.is_packed
    assert packing.num_bytes(64) == switch.weight.nbytes
    assert packing.alike == [packing]


def test_a_dtype_replaces_that_of_floating_point_numbers_only() -> None:
    affine = quantized("affine", 4, 64, mx.float32)
    assert Packing.of(affine, "bfloat16") == Packing.affine(4)
    assert Packing.of(quantized("mxfp4", 4, 32, mx.float32), "bfloat16") == MXFP4
    assert Packing.of(nn.Linear(8, 8), "bfloat16") == Packing.plain("bfloat16")


def test_alike_are_other_dtypes_of_the_scales() -> None:
    found = [str(packing) for packing in Packing.affine(4, 64, "float16").alike]
    assert found[0] == "affine 4 bit/64 float16"
    assert set(found[1:]) == {"affine 4 bit/64 bfloat16", "affine 4 bit/64 float32"}
    assert MXFP8.alike == [MXFP8]


@pytest.mark.parametrize("text", ["", "int3", "affine 4/64", "affine x bit/64 f", None])
def test_other_texts_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"must be like 'affine 4 bit/64 bfloat16'"):
        Packing.parse(text)
