"""A block's routing, obtained from the block's own code.

A MoE block of mlx-lm routes, calls its switch (the stacked experts) once as
``switch(x, ids) -> [..., K, D]``, sums the K outputs with the router's gates and adds
what is shared. Instead of writing each router again, the block's own ``__call__`` runs
on a view of the block in which some children are stubs:

- Gates: the switch keeps ``x`` and ``ids`` and returns the identity, the shared experts
  return zeros. A block is linear in what its switch returns, so that its output is
  then the gates themselves, with every scaling factor and cast that the model applies.
- Shared part: the switch returns zeros.

That a block is linear in this way is not assumed but tried, by `find_probe`, with
random numbers in the place of expert outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.types import Routing

SHARED_NAMES = ("shared_experts", "shared_expert", "share_expert", "shared_mlp")

Stub = Callable[..., mx.array]


class BlockView:
    """A block seen with stubs in the place of some children; it is not touched."""

    def __init__(self, block: nn.Module, stubs: dict[str, Stub]) -> None:
        self._block = block
        self._stubs = stubs

    def __getattr__(self, name: str) -> Any:
        if name in self._stubs:
            return self._stubs[name]
        value = getattr(self._block, name)
        if isinstance(value, MethodType) and value.__self__ is self._block:
            return MethodType(value.__func__, self)  # helpers must see the stubs too
        return value

    def __getitem__(self, name: str) -> Any:
        return self._stubs[name] if name in self._stubs else self._block[name]

    def __contains__(self, name: str) -> bool:
        return name in self._block


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: the block, its class's own ``__call__``, the arguments."""

    block: nn.Module
    block_class: type[nn.Module]
    switch_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, switch: Stub, without_shared: bool = False) -> mx.array:
        """The block's output with `switch` in the place of its own."""
        stubs = {self.switch_name: switch}
        if without_shared:
            stubs |= {name: _zero_column for name in SHARED_NAMES if name in self.block}
        view = BlockView(self.block, stubs)
        return self.block_class.__call__(view, *self.args, **self.kwargs)


class _RecordingSwitch:
    """Stands for the switch: keeps its arguments, answers with the identity."""

    def __init__(self, width: int | None) -> None:
        self.width = width

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        self.x, self.ids = x, ids
        num_slots = ids.shape[-1]
        # float32, so that the model's gates come out as they went in.
        identity = mx.eye(num_slots, self.width or num_slots)
        return mx.broadcast_to(identity, (*ids.shape, identity.shape[1]))


@dataclass(frozen=True)
class Probe:
    """How the routing of one block is read off.

    Attributes:
        width: columns of the identity that stands for the experts: None for K; D for a
            block that reshapes its sum to the model's width.
        has_shared: whether the block adds something to the experts' sum.
        out_dtype: the dtype of the block's output.
        top_k: K.
        row_dims: the width of the rows that the experts take.
        row_dtype: their dtype.
    """

    width: int | None
    has_shared: bool
    out_dtype: mx.Dtype
    top_k: int
    row_dims: int
    row_dtype: mx.Dtype

    def routing(self, call: BlockCall) -> tuple[mx.array, Routing, tuple[int, ...]]:
        """The switch's input ``[T, D]``, its routing, and the output's leading axes."""
        switch = _RecordingSwitch(self.width)
        gates = call.run(switch, without_shared=True)
        num_slots = switch.ids.shape[-1]
        routing = Routing(
            switch.ids.reshape(-1, num_slots).astype(mx.int32),
            gates[..., :num_slots].reshape(-1, num_slots).astype(mx.float32),
        )
        x = switch.x.reshape(-1, switch.x.shape[-1])
        return x, routing, gates.shape[:-1]

    def shared(self, call: BlockCall) -> mx.array | None:
        """What the block adds to the experts' sum, or None."""
        return call.run(_zero_outputs) if self.has_shared else None


def find_probe(call: BlockCall) -> tuple[Probe | None, str]:
    """A probe that reproduces the block, or None and the reason why there is none.

    The block runs on random expert outputs, and so does the formula that the probe
    stands for; they must agree within the rounding of the block's dtype.
    """
    experts = _RandomExperts()
    expected = call.run(experts)
    tolerance = 1e-4 if expected.dtype == mx.float32 else 3e-2
    scale = mx.abs(expected).max()
    reason = ""
    top_k, row_dims = experts.outputs.shape[-2:]
    for width in (None, row_dims):
        probe = Probe(
            width, True, expected.dtype, top_k, row_dims, experts.outputs.dtype
        )
        try:
            _, routing, lead = probe.routing(call)
            shared = probe.shared(call)
            assert shared is not None
            terms = experts.outputs.reshape(*routing.gates.shape, -1)
            routed = (terms * routing.gates[..., None]).sum(axis=1)
            difference = mx.abs(routed.reshape(*lead, -1) + shared - expected).max()
        except (ValueError, TypeError) as error:
            # Shapes that do not meet: the block is not of the form that is tried here.
            reason = reason or f"its code does not run on an identity ({error})"
            continue
        # sync: once per block, when the model is made expert-parallel.
        if not (difference <= tolerance * scale).item():
            reason = "its output is not linear in what the experts return"
            continue
        has_shared = bool((mx.abs(shared).max() > 0).item())
        return replace(probe, has_shared=has_shared), ""
    return None, reason


class _RandomExperts:
    """Random outputs in the place of the experts', the same at each call."""

    outputs: mx.array

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        shape = (*ids.shape, x.shape[-1])
        key = mx.random.key(0)  # the model's own random state stays as it is
        self.outputs = mx.random.normal(shape, key=key).astype(x.dtype)
        return self.outputs


def _zero_outputs(x: mx.array, ids: mx.array) -> mx.array:
    return mx.zeros((*ids.shape, x.shape[-1]), x.dtype)


def _zero_column(x: mx.array, *_: Any) -> mx.array:
    return mx.zeros((*x.shape[:-1], 1), x.dtype)
