"""Linear layers that NumPy's BLAS multiplies where a CPU computes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_ep.models import compute_on_host, host_linear


class Small(nn.Module):
    def __init__(self, large: nn.Module) -> None:
        super().__init__()
        self.large, self.small = large, nn.Linear(64, 64)


def _layer(kind: str, bias: bool, dtype: mx.Dtype) -> nn.Module:
    mx.random.seed(3)
    layer = nn.Linear(512, 640, bias=bias)
    layer.set_dtype(dtype)
    if kind == "dense":
        return layer
    mode, bits = kind.split()
    size = 64 if mode == "affine" else 32
    return nn.QuantizedLinear.from_linear(layer, size, int(bits), mode)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["dense", "affine 4", "affine 8"])
def test_it_gives_what_the_layer_gives(
    kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _layer(kind, bias, mx.float32)
    x = mx.random.normal((2, 3, 512))
    plain, one = layer(x), layer(x[:1, 0])
    model = Small(layer)
    names, form = [name for name, _ in tree_flatten(model.parameters())], type(layer)

    assert compute_on_host(model) == 1
    assert compute_on_host(model) == 0  # once
    assert isinstance(layer, form) and type(model.small) is nn.Linear
    assert [name for name, _ in tree_flatten(model.parameters())] == names

    host = layer(x)
    assert (host.shape, host.dtype) == (plain.shape, plain.dtype)
    largest = mx.abs(plain).max().item()
    assert mx.abs(host - plain).max().item() <= 1e-5 * largest
    monkeypatch.setattr(host_linear.HostMatrices, "multiply", None)
    assert mx.array_equal(layer(x[:1, 0]), one)  # one row is MLX's own
    half = x.astype(mx.float16)
    assert mx.array_equal(layer(half), form.__call__(layer, half))
    with pytest.raises(TypeError):
        layer(x)


@pytest.mark.parametrize("kind", ["dense", "affine 4", "mxfp4 4"])
def test_what_is_in_16_bits_stays(kind: str) -> None:
    assert compute_on_host(Small(_layer(kind, False, mx.bfloat16))) == 0


def test_another_device_computes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(_layer("dense", False, mx.float32))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert compute_on_host(model) == 0
    assert type(model.large) is nn.Linear
