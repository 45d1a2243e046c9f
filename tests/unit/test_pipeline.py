"""Stages of layers: how they are cut, and what stands in for the others."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_ep import EPConfig
from mlx_ep.comm import GroupComm
from mlx_ep.comm.stages import check_transport
from mlx_ep.loading import checkpoint_weights, find_model
from mlx_ep.models import check_hidden_states, connect_stages, keep_layers, layer_list
from mlx_ep.models.pipeline import count_tokens
from mlx_ep.placement import StageLayers, check_stages, cut_stages


@pytest.mark.parametrize(
    ("sizes", "stages", "counts"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([1, 9, 9, 9], 2, [2, 2]),
        ([9, 1, 1, 1], 2, [1, 3]),
        ([1, 1, 1, 1, 1], 3, [2, 2, 1]),
        ([5], 1, [1]),
    ],
)
def test_the_largest_stage_is_as_small_as_can_be(sizes, stages, counts) -> None:
    cut = cut_stages(sizes, stages)
    assert [len(held) for held in cut] == counts
    assert cut[0].start == 0 and cut[-1].stop == len(sizes)
    assert all(a.stop == b.start for a, b in pairwise(cut))


@pytest.mark.parametrize(
    ("room", "counts"), [([30, 10], [3, 1]), ([10, 30], [1, 3]), ([5, 5], [2, 2])]
)
def test_layers_follow_the_room_of_stages(room, counts) -> None:
    assert [len(held) for held in cut_stages([1, 1, 1, 1], 2, room)] == counts


def test_memory_makes_uneven_stages() -> None:
    """Of a rank of each stage: bytes within its memory, all layers held once."""
    path = find_model("jargon-moe")
    even = checkpoint_weights(path, 0, 2, EPConfig(pp=2)).placement.stage
    counts = {}
    for memory in ((0.0035, 1.0), (1.0, 0.0035)):
        config = EPConfig(pp=2, memory=memory)
        weights = [checkpoint_weights(path, rank, 2, config) for rank in (0, 1)]
        stages = [each.placement.stage for each in weights]
        assert (stages[0].start, stages[1].stop) == (0, even.num_layers)
        assert stages[0].stop == stages[1].start
        for each, gigabytes in zip(weights, memory, strict=True):
            assert each.rank_bytes <= gigabytes * 1e9
        counts[memory] = stages[0].stop
    assert counts[0.0035, 1.0] < even.stop < counts[1.0, 0.0035]


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        ((1.0,), "one number for each of the 2 ranks"),
        ((1e-6, 1.0), "which the embedding and the head take"),
        ((0.002, 0.002), "leaves no room"),
    ],
)
def test_memory_that_stages_do_not_fit_is_refused(memory, reason) -> None:
    config = EPConfig(pp=2, memory=memory)
    with pytest.raises(ValueError, match=reason):
        checkpoint_weights(find_model("jargon-moe"), 0, 2, config)


def test_stages_that_are_not_possible_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer for each stage"):
        cut_stages([1, 1], 3)
    with pytest.raises(ValueError, match="must divide the 4 ranks"):
        check_stages(3, 4)
    assert check_stages(2, 4) == 2


def test_transports_that_carry_no_messages_of_other_sizes_are_refused() -> None:
    group = mx.distributed.init()
    for transport in ("jaccl", "jaccl-ring", "none"):
        with pytest.raises(ValueError, match=f"which {transport} does not carry"):
            check_transport(GroupComm(group, transport=transport), 2)
    for transport in ("ring", "mpi"):
        check_transport(GroupComm(group, transport=transport), 2)
    check_transport(GroupComm(group, transport="jaccl"), 1)


def test_a_tensor_is_of_the_layer_of_its_first_number() -> None:
    stage = StageLayers(2, 4, 6, "layers")
    assert stage.is_elsewhere("model.layers.1.mlp.experts.3.up_proj.weight")
    assert not stage.is_elsewhere("model.layers.3.mlp.experts.1.up_proj.weight")
    assert not stage.is_elsewhere("model.embed_tokens.weight")
    assert not stage.is_elsewhere("model.blocks.1.weight")
    # Behind the last layer: of what mlx-lm leaves out.
    assert not stage.is_elsewhere("model.layers.6.mlp.weight")


@pytest.mark.parametrize(
    "given",
    [
        {"attention": "tensor"}, {"overlap": "two"}, {"overlap": "auto"},
        {"strategy": "all_to_all"}, {"replica_memory": "1GB"},
        {"memory": (1.0, 1.0), "context": 8}, {"ep_size": 2}, {"rebalance_every": 4},
    ],
)  # fmt: skip
def test_what_stages_do_not_do_is_refused(given) -> None:
    with pytest.raises(ValueError, match="--pp 2 does not go with"):
        EPConfig(pp=2, **given)
    EPConfig(pp=2, overlap="single")


class Tape:
    """A link within a process: what one stage sends the next one finds."""

    def __init__(self) -> None:
        self.count, self.index, self.sent = 2, 0, []

    def receive(self, like: mx.array) -> mx.array:
        (x,) = self.sent
        assert x.shape == like.shape
        return x

    def send(self, x: mx.array) -> mx.array:
        self.sent = [x]
        return x

    def share(self, x: mx.array) -> mx.array:
        return x


def loaded() -> tuple:
    return mlx_lm.load(str(find_model("jargon-moe")))


def test_two_stages_give_the_logits_of_the_whole_model() -> None:
    """Over several steps: stand-ins count tokens in caches that keep nothing."""
    whole, _ = loaded()
    num_layers = len(whole.layers)
    tape, stages = Tape(), []
    for index, (start, stop) in enumerate([(0, 1), (1, num_layers)]):
        model, _ = loaded()
        keep_layers(model, start, stop)
        tape.index = index
        connect_stages(model, tape)
        stages.append((model, make_prompt_cache(model)))
    cache = make_prompt_cache(whole)
    for tokens in ([[5, 6, 7, 8]], [[9, 10, 11]], [[12]], [[13]]):
        expected = whole(mx.array(tokens), cache=cache)
        logits = [model(mx.array(tokens), cache=own) for model, own in stages]
        assert mx.array_equal(logits[1], expected)
    for (model, own), held in zip(stages, (1, num_layers - 1), strict=True):
        mx.eval([each.state for each in own])
        assert sum(each.nbytes > 0 for each in own) == held
        assert {each.offset for each in own} == {9}
        names = dict(tree_flatten(model.parameters()))
        path, _ = layer_list(model)
        numbers = {n.removeprefix(path).split(".")[1] for n in names if path in n}
        assert len(numbers) == held


@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(8, keep=2)])
def test_a_cache_that_counts_makes_the_masks_of_a_full_one(make) -> None:
    full, counting = make(), make()
    for num_tokens in (5, 6, 1, 1, 3):
        for window in (None, 4):
            masks = [each.make_mask(num_tokens, window_size=window, return_array=False)
                     for each in (full, counting)]  # fmt: skip
            assert type(masks[0]) is type(masks[1])
            if isinstance(masks[0], mx.array):
                assert mx.array_equal(*masks)
        keys = mx.ones((1, 2, num_tokens, 4))
        full.update_and_fetch(keys, keys)
        count_tokens(counting, 1, num_tokens)
        assert counting.offset == full.offset and counting.nbytes == 0
        mx.eval(counting.state)


def test_a_layer_that_gives_more_than_hidden_states_is_refused() -> None:
    model, _ = loaded()
    tokens = mx.array([[1, 2, 3]])
    check_hidden_states(model, lambda: model(tokens))
    layer = model.layers[0]

    class Scaled(type(layer)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)[:, :1]

    layer.__class__ = Scaled
    with pytest.raises(ValueError, match="hand on hidden states and nothing else"):
        check_hidden_states(model, lambda: model(tokens))
    assert type(layer) is Scaled
