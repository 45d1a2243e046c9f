"""Where the ranks' parts of a block are added, and that a wrong place is found out."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.comm import GroupComm
from mlx_ep.models import find_forms, routing_probe
from mlx_ep.models.block_call import BlockCall
from mlx_ep.models.block_form import agree_forms
from mlx_ep.models.partial_sum import PartialSum, find_partial_sum
from mlx_ep.models.routing_probe import IdentityProbe, StandInProbe, find_probe
from tests.support import tiny

D, F, E, K = 16, 8, 5, 2


class Block(nn.Module):
    """A MoE block; `finish` is what it does with the sum of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.switch_mlp = SwitchGLU(D, F, E)
        self.shared_experts = nn.Linear(D, D)
        self.norm = nn.RMSNorm(D)
        self.out = nn.Linear(D, D)
        self.sharding_group = None

    def routed(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.gate(x), axis=-1)
        ids = mx.argpartition(-scores, kth=K - 1, axis=-1)[..., :K]
        gates = mx.take_along_axis(scores, ids, axis=-1)
        return (self.switch_mlp(x, ids) * gates[..., None]).sum(axis=-2)

    def reduced(self, y: mx.array) -> mx.array:
        if self.sharding_group is None:
            return y
        return mx.distributed.all_sum(y, group=self.sharding_group)


class Plain(Block):
    def __call__(self, x: mx.array) -> mx.array:
        return self.routed(x) + self.shared_experts(x)


class SharedInside(Block):
    """As mlx-lm's tensor parallelism has it mostly."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.reduced(self.routed(x) + self.shared_experts(x))


class SharedOutside(Block):
    """The sum does not hold the shared experts: every rank must run them."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.reduced(self.routed(x))) + self.shared_experts(x)


class NormInside(Block):
    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.reduced(self.routed(x) + self.shared_experts(x)))


class Biased(Block):
    """Linear, but for a bias that every rank would add."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.out(self.routed(x))


class AddsInput(Block):
    """Adds its input, which every rank would add."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.routed(x) + x


class NormAfter(Block):
    """A norm behind the sum, and no place for a sum over ranks before it."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.routed(x))


class NormBeforeReduce(Block):
    """Its own sum over ranks is in the wrong place for experts."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.reduced(self.norm(self.routed(x)))


class ReducesTwice(Block):
    def __call__(self, x: mx.array) -> mx.array:
        return self.reduced(self.routed(x)) + self.reduced(self.shared_experts(x))


def _call(block: nn.Module) -> BlockCall:
    x = mx.random.normal((1, 40, D), key=mx.random.key(1))
    return BlockCall(block, type(block), ("switch_mlp",), (x,), {})


def _block(kind: type[Block], with_group: bool = True) -> Block:
    mx.random.seed(3)
    block = kind()
    if not with_group:
        del block.sharding_group
        block.reduced = lambda y: y  # type: ignore[method-assign]
    return block


@pytest.mark.parametrize(
    ("kind", "with_group", "expected"),
    [
        (Plain, False, PartialSum(in_block=False, shared_once=True)),
        (SharedInside, False, PartialSum(in_block=False, shared_once=True)),
        (SharedInside, True, PartialSum(in_block=True, shared_once=True)),
        (SharedOutside, True, PartialSum(in_block=True, shared_once=False)),
        (NormInside, True, PartialSum(in_block=True, shared_once=True)),
    ],
)
def test_the_place_is_found(
    kind: type[Block], with_group: bool, expected: PartialSum
) -> None:
    found, reason = find_partial_sum(_call(_block(kind, with_group)))
    assert (found, reason) == (expected, "")


@pytest.mark.parametrize(
    "kind", [Biased, AddsInput, NormAfter, NormBeforeReduce, ReducesTwice]
)
def test_no_place_is_made_up(kind: type[Block]) -> None:
    """None of them is one sum: the whole block differs from its parts, added."""
    with_group = kind in (NormBeforeReduce, ReducesTwice)
    found, reason = find_partial_sum(_call(_block(kind, with_group)))
    if kind is ReducesTwice:  # without its own sums it is linear
        assert found == PartialSum(in_block=False, shared_once=True)
    else:
        assert found is None
        assert reason == "its output is not one sum over the experts"


@pytest.mark.parametrize("kind", [SharedInside, SharedOutside, NormInside])
def test_parts_add_up_to_the_block(kind: type[Block]) -> None:
    """Three ranks with real experts, and a fake sum over them."""
    block = _block(kind)
    call = _call(block)
    way, _ = find_partial_sum(call)
    assert way is not None
    block.sharding_group = None
    expected = block(*call.args)
    parts: list[mx.array] = []

    def run(rank: int, reduce: Any) -> mx.array:
        def switch(x: mx.array, ids: mx.array) -> mx.array:
            own = (ids % 3 == rank)[..., None]
            return mx.where(own, block.switch_mlp(x, ids), 0)

        return way.output(call, switch, reduce, has_shared=rank == 0)

    for rank in range(3):
        run(rank, lambda part: parts.append(part) or part)
    total = parts[0] + parts[1] + parts[2]
    for rank in range(3):
        found = run(rank, lambda _: total)
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


def test_nothing_of_the_block_is_changed() -> None:
    block = _block(SharedOutside)
    before = dict(block)
    find_partial_sum(_call(block))
    assert block.sharding_group is None
    assert all(block[name] is value for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "exit_name", "adds_input"),
    [
        (Biased, "out", False),
        (NormAfter, "norm", False),
        (SharedOutside, "norm", False),
        (AddsInput, "", True),
        (Plain, "", False),
    ],
)
def test_routing_is_read_off(
    monkeypatch: pytest.MonkeyPatch, kind: type[Block], exit_name: str, adds_input: bool
) -> None:
    """Also where the experts' sum goes into another layer of the block."""
    monkeypatch.setattr(routing_probe, "_takes_stand_in", lambda *_: False)
    probe, reason = find_probe(_call(_block(kind)))
    assert type(probe) is IdentityProbe, reason
    assert probe.exit == exit_name
    assert probe.adds_input == adds_input
    assert probe.top_k == K


@pytest.mark.parametrize("kind", [Biased, NormAfter, SharedOutside, AddsInput, Plain])
def test_one_pass_is_enough_where_the_outputs_are_summed_at_once(
    kind: type[Block],
) -> None:
    probe, reason = find_probe(_call(_block(kind)))
    assert type(probe) is StandInProbe, reason
    assert (probe.top_k, probe.row_dims) == (K, D)


class SumsByFunction(Block):
    def routed(self, x: mx.array) -> mx.array:
        ids = mx.argpartition(-self.gate(x), kth=K - 1, axis=-1)[..., :K]
        gates = mx.take_along_axis(self.gate(x), ids, axis=-1)
        return self.weighted(self.switch_mlp(x, ids), gates[..., None])

    def weighted(self, y: mx.array, gates: mx.array) -> mx.array:
        return mx.sum(y * gates, axis=-2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.routed(x)


class GatesFirst(SumsByFunction):
    def weighted(self, y: mx.array, gates: mx.array) -> mx.array:
        return (gates * y).sum(-2)


class SumsTwice(SumsByFunction):
    def weighted(self, y: mx.array, gates: mx.array) -> mx.array:
        return (y * gates).sum(-2) + (y * (1 - gates)).sum(-2)


class GatePerNumber(SumsByFunction):
    def weighted(self, y: mx.array, gates: mx.array) -> mx.array:
        return (y * mx.broadcast_to(gates, y.shape)).sum(-2)


class AddsBefore(SumsByFunction):
    """A stand-in has no place for it; the sum is as linear as the others."""

    def weighted(self, y: mx.array, gates: mx.array) -> mx.array:
        return (y * gates + 0).sum(-2)


@pytest.mark.parametrize(
    "kind", [SumsByFunction, GatesFirst, SumsTwice, GatePerNumber, AddsBefore]
)
def test_other_uses_of_the_outputs_are_told_from_it(kind: type[Block]) -> None:
    probe, _ = find_probe(_call(_block(kind)))
    assert type(probe) is IdentityProbe


class LeavesOneOut(SumsByFunction):
    """What is done with the sum depends on what the outputs are."""

    def weighted(self, y: mx.array, gates: mx.array) -> mx.array:
        y = y if isinstance(y, mx.array) else y.astype(y.dtype)
        total = (y * gates).sum(-2)
        return total if isinstance(y, mx.array) else 2 * total


def test_a_block_that_sees_through_the_stand_in_is_found_out() -> None:
    probe, _ = find_probe(_call(_block(LeavesOneOut)))
    assert type(probe) is IdentityProbe


def test_split_shared_experts_have_to_join_the_sum() -> None:
    """What leaves by another layer, or adds more, is not tried with them."""
    for kind in (Biased, AddsInput):
        assert find_probe(_call(_block(kind)), has_partial=True)[0] is None
    assert find_probe(_call(_block(Plain)), has_partial=True)[0] is not None


class _OtherRank(GroupComm):
    """A group of two: the other rank has found another way for every block."""

    def all_gather(self, x: mx.array) -> mx.array:
        return mx.concatenate([x, x + 1])


def test_ranks_that_disagree_take_the_way_that_needs_no_check() -> None:
    model = tiny.make_model(tiny.QWEN3_MOE)
    comm = _OtherRank(mx.distributed.init())
    for form in find_forms(model, comm, is_sharded=False):
        assert form.tier == "per-slot"
        assert form.why_not_routed == "the ranks' checks of it disagree"


def test_blocks_of_one_class_share_the_lowest_tier() -> None:
    model = tiny.make_model(tiny.QWEN3_MOE)
    comm = GroupComm(mx.distributed.init())
    first, second = find_forms(model, comm, is_sharded=False)
    assert (first.tier, second.tier) == ("routed", "routed")
    way = PartialSum(in_block=False, shared_once=True)
    first = first.lowered("partial-sum", way, "a reason")
    for form in agree_forms([first, second], comm):
        assert (form.tier, form.partial_sum) == ("partial-sum", way)
        assert form.why_not_routed == "a reason"


def test_blocks_are_tried_on_a_model_that_stays_as_it_is() -> None:
    """Also where the trial fails."""
    model = tiny.make_model(tiny.QWEN3_MOE)
    comm = GroupComm(mx.distributed.init())
    before = {path: type(module) for path, module in model.named_modules()}
    find_forms(model, comm, is_sharded=False)
    model.lm_head = None
    with pytest.raises(TypeError):
        find_forms(model, comm, is_sharded=False)
    del model.lm_head
    after = {path: type(module) for path, module in model.named_modules()}
    assert after == {path: kind for path, kind in before.items() if path != "lm_head"}
    assert not any(hasattr(m, "expert_parallel") for m in model.modules())
