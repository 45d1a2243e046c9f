"""Small switches, the layers that policies see them as, and what a policy chooses."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.rows import Option
from mlx_ep.tune import Layer

KERNELS = Option("metal", "metal")
D, F, E, K = 32, 16, 6, 2


def make_switch(dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(1)
    switch = SwitchGLU(D, F, E)
    switch.set_dtype(dtype)
    mx.eval(switch.parameters())
    return switch


def make_layer(switch: nn.Module, dtype: mx.Dtype = mx.float32) -> Layer:
    return Layer(switch, dtype, K)


def fail(total: mx.array) -> mx.array:
    raise RuntimeError("[metal] Unable to build the kernel")
