"""A block's routing, obtained from the block's own code.

A MoE block of mlx-lm routes, calls its switch (the stacked experts) once as
``switch(x, ids) -> [..., K, D]``, sums the K outputs with the router's gates and adds
what is shared. Instead of writing each router again, the block's own ``__call__`` runs
on a view of the block in which some children are stubs:

- Most blocks weight and sum the outputs at once. Their switch gives a stand-in that
  hears of the gates and answers with the finished sum (`mlx_ep.models.stand_in`): one
  pass, in which everything else that the block does is done.
- For the others, the switch keeps ``x`` and ``ids`` and returns the identity, the
  shared experts return zeros. A block is linear in what its switch returns, so that its
  output is then the gates themselves, with every scaling factor and cast that the model
  applies. A second pass, in which the switch returns zeros, gives the shared part.
- Where the experts' sum goes into another layer before the block's end (a projection
  from a latent width, a norm), the gates are what goes into that layer, and the block
  is run to its end with the sum in their place.

That a block is of one of these forms is not assumed but tried, by `find_probe`, with
random numbers in the place of expert outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
from jaxtyping import Float32

from mlx_ep.models.block_call import (
    BlockCall,
    RandomExperts,
    Stub,
    tolerance,
    zero_column,
    zero_outputs,
)
from mlx_ep.models.stand_in import OutputsStandIn
from mlx_ep.types import Routing

# Of the identity where something is taken off the gates: a power of two, so large that
# the rounding of what is taken off does not show in them.
_SCALE = 4096.0


class _RecordingSwitch:
    """Stands for the switch: keeps its arguments, answers with the identity."""

    def __init__(self, width: int | None, scale: float) -> None:
        self.width, self.scale = width, scale

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        self.x, self.ids = x, ids
        num_slots = ids.shape[-1]
        identity = _identity(num_slots, self.width or num_slots, self.scale)
        return mx.broadcast_to(identity, (*ids.shape, identity.shape[1]))


@lru_cache(maxsize=64)
def _identity(num_slots: int, width: int, scale: float) -> Float32[mx.array, "K W"]:
    """float32, so that the model's gates come out as they went in."""
    identity = scale * mx.eye(num_slots, width)
    # sync: once per process and shape.
    mx.eval(identity)
    return identity


@dataclass(frozen=True)
class StandInProbe:
    """The block's switch gives `OutputsStandIn`.

    Attributes:
        top_k: K.
        row_dims: the width of the rows that the experts take.
        row_dtype: their dtype.
    """

    top_k: int
    row_dims: int
    row_dtype: mx.Dtype


@dataclass(frozen=True)
class IdentityProbe:
    """The block's switch gives the identity, in a pass of its own.

    Attributes:
        width: columns of the identity that stands for the experts: None for K; D for a
            block that needs the model's width.
        has_shared: whether the block adds something to the experts' sum.
        out_dtype: the dtype of the block's output, or of what goes into `exit`.
        top_k: K.
        row_dims: the width of the rows that the experts take.
        row_dtype: their dtype.
        adds_input: whether the block adds more than its shared experts, such as
            identity experts: what it gives for no experts is taken off the gates.
        exit: the layer of the block that the experts' sum goes into, where that is
            not the block's end: a projection from a latent width, or a norm.
    """

    width: int | None
    has_shared: bool
    out_dtype: mx.Dtype
    top_k: int
    row_dims: int
    row_dtype: mx.Dtype
    adds_input: bool = False
    exit: str = ""

    def routing(self, call: BlockCall) -> tuple[mx.array, Routing, tuple[int, ...]]:
        """The switch's input ``[T, D]``, its routing, and the output's leading axes."""
        scale = _SCALE if self.adds_input else 1.0
        switch = _RecordingSwitch(self.width, scale)
        if self.exit:
            gates = call.run_until(self.exit, switch, zero_column)
        else:
            gates = call.run(switch, zero_column)
        if self.adds_input:
            gates = (gates - call.run(zero_outputs, zero_column)) / scale
        num_slots = switch.ids.shape[-1]
        routing = Routing(
            switch.ids.reshape(-1, num_slots).astype(mx.int32),
            gates[..., :num_slots].reshape(-1, num_slots).astype(mx.float32),
        )
        if self.adds_input:  # an identity expert has the number of a real one there
            ids = mx.where(routing.gates == 0, -1, routing.expert_ids)
            routing = Routing(ids, routing.gates)
        x = switch.x.reshape(-1, switch.x.shape[-1])
        return x, routing, gates.shape[:-1]

    def shared(self, call: BlockCall) -> mx.array | None:
        """What the block adds to the experts' sum, or None."""
        return call.run(zero_outputs) if self.has_shared else None

    def leave(self, call: BlockCall, total: mx.array) -> mx.array:
        """The block's output from the experts' sum that goes into `exit`."""
        layer = call.block[self.exit]
        stub = {self.exit: lambda _: layer(total.astype(self.out_dtype))}
        return call.run(zero_outputs, children=stub)


Probe = StandInProbe | IdentityProbe


def find_probe(call: BlockCall, has_partial: bool = False) -> tuple[Probe | None, str]:
    """A probe that reproduces the block, or None and the reason why there is none.

    The block runs on random expert outputs, and so does the formula that the probe
    stands for; they must agree within the rounding of the block's dtype.

    Args:
        has_partial: whether the block's shared experts are a part of what all ranks
            have, which has to go through the same sum as the experts.
    """
    experts = RandomExperts()
    expected = call.run(experts)
    top_k, row_dims = experts.outputs.shape[-2:]
    reason = ""
    # A stand-in gives a finished sum; parts of shared experts cannot join it any more.
    if not has_partial and _takes_stand_in(call, experts, expected):
        return StandInProbe(top_k, row_dims, experts.outputs.dtype), ""
    for probe in _candidates(call, experts.outputs, expected.dtype, has_partial):
        try:
            found, probe = _try(probe, call, experts.outputs)
            difference = mx.abs(found - expected).max()
        except (ValueError, TypeError, AttributeError) as error:
            # Shapes that do not meet, or an exit before the experts: the block is not
            # of the form that is tried here.
            reason = reason or f"its code does not run on an identity ({error})"
            continue
        # sync: once per block, when the model is made expert-parallel.
        if (difference <= tolerance(expected)).item():
            return probe, ""
        if not (probe.adds_input or probe.exit):
            reason = "its output is not linear in what the experts return"
    return None, reason


def _takes_stand_in(call: BlockCall, experts: Stub, expected: mx.array) -> bool:
    """Whether a block does with a stand-in what it does with outputs."""
    num_sums = 0

    def routed_sum(
        x: mx.array, ids: mx.array, gates: mx.array, dtype: mx.Dtype
    ) -> mx.array:
        nonlocal num_sums
        num_sums += 1
        terms = experts(x, ids).astype(mx.float32) * gates
        return terms.sum(axis=-2).astype(dtype)

    try:
        found = call.run(lambda x, ids: OutputsStandIn(x, ids, routed_sum))
    except (ValueError, TypeError, AttributeError):
        return False  # it uses the outputs otherwise
    if num_sums != 1 or not isinstance(found, mx.array):
        return False
    difference = mx.abs(found - expected).max()
    # sync: once per block, when the model is made expert-parallel.
    return bool((difference <= tolerance(expected)).item())


def _candidates(
    call: BlockCall, outputs: mx.array, out_dtype: mx.Dtype, has_partial: bool
) -> Iterator[IdentityProbe]:
    top_k, row_dims = outputs.shape[-2:]
    probe = IdentityProbe(None, True, out_dtype, top_k, row_dims, outputs.dtype)
    yield probe
    yield (wide := replace(probe, width=row_dims))
    if has_partial:
        return
    yield replace(wide, adds_input=True)
    for name in call.child_names:
        yield replace(wide, has_shared=False, exit=name)


def _try(
    probe: IdentityProbe, call: BlockCall, outputs: mx.array
) -> tuple[mx.array, IdentityProbe]:
    """The block's output by a probe's formula, and the probe with what that showed.

    Args:
        outputs: in the place of the experts', ``[..., K, D]``.
    """
    _, routing, lead = probe.routing(call)
    terms = outputs.reshape(*routing.gates.shape, -1)
    total = (terms * routing.gates[..., None]).sum(axis=1).reshape(*lead, -1)
    if probe.exit:
        dtype = call.run_until(probe.exit, RandomExperts(), zero_column).dtype
        probe = replace(probe, out_dtype=dtype)
        return probe.leave(call, total), probe
    shared = call.run(zero_outputs)
    # sync: once per block, when the model is made expert-parallel.
    has_shared = bool((mx.abs(shared).max() > 0).item())
    return total + shared, replace(probe, has_shared=has_shared)
