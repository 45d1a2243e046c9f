"""Linear layers of several rows by NumPy's BLAS, where a CPU computes.

MLX's CPU build takes as long for each row of a packed matrix as for the first one, 1.2
ns a weight on one x86 core. Unpacking the matrix once costs about as much as one row,
and NumPy's BLAS adds 0.02 ns a weight for each. So a prompt of 64 tokens took 20 to 40
times as long, and most of a server's time.

Only what is float32: in 16 bits MLX's own product differs from one that is added in
float32 by more than the last bit, and tokens would be others than mlx-lm's.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float

from mlx_ep.experts import HostMatrices, Matrices
from mlx_ep.types import Packing, view_on_host

# Weights from which on the wait for the rows, about 0.1 ms, is little beside a product.
LEAST_WEIGHTS = 1 << 18
# Of those that are multiplied at once; with one, MLX is as fast.
LEAST_ROWS = 2
_FORMS = (nn.Linear, nn.QuantizedLinear)


def compute_on_host(model: nn.Module) -> int:
    """Have the large linear layers of a model multiply many rows with NumPy's BLAS.

    Paths, parameters and ``isinstance`` stay as they were. Which rows go where follows
    from their number alone, so that ranks with the same rows compute alike.

    Returns:
        How many layers; 0 where another device than the CPU computes.
    """
    if mx.default_device().type != mx.cpu:
        return 0
    found = [layer for _, layer in model.named_modules() if _is_large(layer)]
    for layer in found:
        # A plain object, which nn.Module takes for neither parameter nor child.
        layer.on_host = HostLinear(layer, type(layer))
        form: type[nn.Module] = type(layer)
        layer.__class__ = _host_class(form)
    return len(found)


class HostLinear:
    """What a layer computes instead of its own code.

    Args:
        layer: whose weights it reads.
        form: the layer's own class.
    """

    def __init__(self, layer: nn.Module, form: type[nn.Module]) -> None:
        self._layer, self._form = layer, form

    def __call__(
        self, x: Float[mx.array, "... columns"]
    ) -> Float[mx.array, "... rows"]:
        """The layer's product, with one host sync where BLAS multiplies."""
        count = x.size // x.shape[-1]
        if count < LEAST_ROWS or x.dtype != mx.float32:
            output: mx.array = self._form.__call__(self._layer, x)
            return output
        # sync: the host multiplies.
        columns = np.ascontiguousarray(view_on_host(x.reshape(count, -1)).T)
        matrices = self._matrices
        scratch = np.empty(matrices.block_bytes // 4, np.float32)
        product = mx.array(matrices.multiply(0, columns, scratch).T)
        return product.reshape(*x.shape[:-1], -1)

    @cached_property
    def _matrices(self) -> HostMatrices:
        layer = self._layer

        def one(name: str) -> mx.array | None:
            return None if name not in layer else layer[name][None]

        return HostMatrices(
            Matrices(
                weight=layer["weight"][None],
                packing=Packing.of(layer),
                scales=one("scales"),
                offsets=one("biases"),
                bias=one("bias"),
            )
        )


def _numbers(layer: nn.Module) -> mx.array:
    """What its results are of the dtype of; packings without offsets have none."""
    found: mx.array = layer.get("biases", layer["weight"])
    return found


def _is_large(layer: nn.Module) -> bool:
    # A subclass may compute something else.
    if type(layer) not in _FORMS or _numbers(layer).dtype != mx.float32:
        return False
    rows, words = layer["weight"].shape
    bits = getattr(layer, "bits", 32)
    return int(rows * words * 32 // bits) >= LEAST_WEIGHTS


@cache
def _host_class(form: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, x: mx.array) -> mx.array:
        output: mx.array = self.on_host(x)
        return output

    return type(f"Host{form.__name__}", (form,), {"__call__": call})
