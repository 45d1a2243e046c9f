"""Batches with a draft: the tokens without one, whatever the draft proposes."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.sample_utils import make_sampler

from mlx_ep.generate.row_cache import RowCache, check_row_caches
from mlx_ep.generate.speculative import Drafting, SpeculativeGenerator
from tests.support import tiny

GREEDY = make_sampler(0.0)
PROMPTS = [[5], [7, 9, 11, 13, 15, 2], [3, 4], list(range(20, 60)), [8, 1, 8]]
MOST = [9, 1, 12, 7, 12]


def _answers(
    make: Any, model: nn.Module, stop: int | None, samplers: list[Any]
) -> tuple[list[list[int]], list[str], list[Any]]:
    generator = make(
        model,
        stop_tokens=[] if stop is None else [[stop]],
        completion_batch_size=3,
        prefill_batch_size=2,
        prefill_step_size=16,
    )
    uids = generator.insert(PROMPTS, MOST, samplers=samplers)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    ends: dict[int, Any] = {}
    while len(ends) < len(uids):
        for response in generator.next()[1]:
            assert response.uid not in ends
            tokens[response.uid].append(response.token)
            if response.finish_reason:
                ends[response.uid] = response
    generator.close()
    reasons = [ends[uid].finish_reason for uid in uids]
    return list(tokens.values()), reasons, [ends[uid] for uid in uids]


def _drafted(draft: nn.Module, num_tokens: int, samplers: Any = None) -> Any:
    drafting = Drafting(draft, num_tokens, samplers or {GREEDY: GREEDY}, lambda x: x)
    return partial(SpeculativeGenerator, drafting=drafting)


class _Sometimes(nn.Module):
    """Proposes what the model will draw, but for some tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def layers(self) -> Any:
        return self.model.layers

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        logits = self.model(tokens, cache=cache)
        return mx.where((tokens % 3 == 0)[..., None], -logits, logits)


@pytest.mark.parametrize("num_tokens", [1, 3, 6])
@pytest.mark.parametrize("kind", ["itself", "other", "sometimes"])
def test_tokens_are_those_without_a_draft(kind: str, num_tokens: int) -> None:
    model = tiny.make_model(tiny.DENSE, 1)
    draft = {
        "itself": model,
        "other": tiny.make_model(tiny.DENSE, 2),
        "sometimes": _Sometimes(model),
    }[kind]
    greedy = [GREEDY] * len(PROMPTS)
    expected, reasons, _ = _answers(BatchGenerator, model, None, greedy)
    assert reasons == ["length"] * len(PROMPTS)
    assert [len(its) for its in expected] == MOST
    stop = expected[2][4]
    for ends_at in (None, stop):
        wanted = _answers(BatchGenerator, model, ends_at, greedy)
        got = _answers(_drafted(draft, num_tokens), model, ends_at, greedy)
        assert got[:2] == wanted[:2]
        accepted = sum(end.num_accepted for end in got[2])
        drafted = sum(end.num_drafted for end in got[2])
        if kind != "itself":
            assert 0 <= accepted < drafted
        elif ends_at is None:
            assert accepted == drafted > 0
        else:  # what was proposed behind the end was not taken
            assert 0 < accepted <= drafted


def test_acceptance_is_counted() -> None:
    """A draft that is always right: 1 token, then 4 a turn, then what there is room
    for.
    """
    model = tiny.make_model(tiny.DENSE, 1)
    greedy = [GREEDY] * len(PROMPTS)
    _, _, ends = _answers(_drafted(model, 3), model, None, greedy)
    counts = [(end.num_drafted, end.num_accepted) for end in ends]
    # 9 = 1 + 4 + 4; 1; 12 = 1 + 4 + 4 + 3; 7 = 1 + 4 + 2. The last one is alone at
    # its end, where there is room for 3: of those the third is not drafted.
    assert counts == [(6, 6), (0, 0), (9, 9), (5, 5), (8, 8)]


def test_sequences_may_have_samplers_of_their_own() -> None:
    """One that draws always the second best token, next to greedy ones."""

    def second(logprobs: mx.array) -> mx.array:
        return mx.argsort(logprobs, axis=-1)[..., -2]

    model = tiny.make_model(tiny.DENSE, 1)
    samplers = [GREEDY, second, second, GREEDY, second]
    expected = _answers(BatchGenerator, model, None, samplers)
    for drafts in ({GREEDY: GREEDY, second: second}, {GREEDY: second, second: GREEDY}):
        got = _answers(_drafted(model, 3, drafts), model, None, samplers)
        assert got[:2] == expected[:2]


def test_a_seed_holds() -> None:
    model, draft = tiny.make_model(tiny.DENSE, 1), tiny.make_model(tiny.DENSE, 2)
    sampler = make_sampler(1.0)
    make = _drafted(draft, 3, {sampler: sampler})
    texts = []
    for seed in (4, 4, 5):
        mx.random.seed(seed)
        texts.append(_answers(make, model, None, [sampler] * len(PROMPTS))[0])
    assert texts[0] == texts[1] != texts[2]


def test_row_cache_holds_what_a_batch_cache_does() -> None:
    """Rows are written, taken back, joined and left; each sees its own tokens."""
    mx.random.seed(0)
    keys = mx.random.normal((3, 2, 6, 4))
    values = mx.random.normal((3, 2, 6, 5))
    cache = RowCache(3)
    for start, stop in ((0, 2), (2, 3)):
        cache.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
    cache.rewind([1, 3, 2])
    found, _ = cache.update_and_fetch(keys[:, :, 3:5], values[:, :, 3:5])
    assert cache.lengths == cache.offset.tolist() == [3, 5, 4]
    for row, kept in enumerate([1, 3, 2]):
        expected = mx.concatenate([keys[row, :, :kept], keys[row, :, 3:5]], axis=1)
        assert mx.array_equal(found[row, :, : kept + 2], expected)
    mask = cache.make_mask(2)
    assert mask.shape == (3, 1, 2, 7)
    assert mask.sum(-1).squeeze(1).tolist() == [[4, 5], [6, 7], [5, 6]]
    window = cache.make_mask(2, window_size=3)
    assert window.sum(-1).squeeze(1).tolist() == [[3, 3]] * 3
    later = RowCache(2)
    later.extend(cache)
    later.filter([0, 4, 2])
    assert later.lengths == [0, 4, 3]
    assert later.keys is not None
    assert mx.array_equal(later.keys[1, :, :4], found[2, :, :4])
    before = later.nbytes
    later.filter([1])
    assert later.nbytes == before // 3
    padded = BatchKVCache([0])
    padded.update_and_fetch(keys[:1], values[:1])
    assert later.make_mask(1).all()


def test_room_grows_in_steps() -> None:
    cache = RowCache(1)
    for count, places in ((250, 256), (6, 256), (1, 512), (300, 768)):
        cache.update_and_fetch(*[mx.ones((1, 1, count, 2))] * 2)
        assert cache.keys is not None
        assert cache.keys.shape == (1, 1, places, 2)


def test_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this model's .*RotatingKVCache.* cannot"):
        check_row_caches(tiny.make_model(tiny.GPT_OSS), "this model's")
    check_row_caches(tiny.make_model(tiny.LONGCAT), "this model's")
