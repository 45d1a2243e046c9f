"""Who enters, who leaves, whose prompt goes on: without a model."""

from __future__ import annotations

from random import Random

import pytest

from mlx_ep.server.prefix_cache import PrefixCache, PrefixHit
from mlx_ep.server.requests import QueueFull, Request
from mlx_ep.server.router import RankLoad, choose_rank
from mlx_ep.server.scheduler import (
    PATIENCE,
    Decision,
    Pending,
    RequestScheduler,
    choose_chunks,
)
from mlx_ep.server.sizes import BLOCK, KvSizes

SIZES = KvSizes(per_token=10, windows=((100, 3),), fixed=7)


def _request(name: str, prompt: int = 5, most: int = 4) -> Request:
    return Request(name, tuple(range(prompt)), most)


def _scheduler(**options: object) -> RequestScheduler:
    defaults: dict[str, object] = {
        "places": 3, "most_waiting": 2, "prefill_step": 16, "limits": [10**9],
    }  # fmt: skip
    defaults |= options
    limits = defaults.pop("limits")
    return RequestScheduler(SIZES, limits, **defaults)  # type: ignore[arg-type]


def _entered(decision: Decision) -> list[tuple[str, int]]:
    return [(enter.request.id, enter.place) for enter in decision.enter]


def test_sizes() -> None:
    assert SIZES.held(50) == 50 * 10 + 50 * 3 + 7
    assert SIZES.held(300) == 300 * 10 + 100 * 3 + 7
    # As wide as the longest, in blocks.
    assert SIZES.batch([5, 257]) == 2 * SIZES.held(2 * BLOCK)
    assert SIZES.batch([]) == 0


def test_requests_enter_at_the_next_step_and_places_are_used_again() -> None:
    scheduler = _scheduler()
    for name in "abcde":
        scheduler.add(_request(name))
    assert _entered(scheduler.decide()) == [("a", 0), ("b", 1), ("c", 2)]
    assert scheduler.num_waiting == 2
    scheduler.ended(1, "b")
    assert _entered(scheduler.decide()) == [("d", 1)]
    # What ended before its place was taken again changes nothing.
    scheduler.ended(1, "b")
    assert scheduler.places[1].request.id == "d"


def test_the_queue_is_bounded_beside_free_places() -> None:
    scheduler = _scheduler()
    for name in "abcde":  # 3 places, 2 waiting
        scheduler.add(_request(name))
    with pytest.raises(QueueFull) as error:
        scheduler.add(_request("f"))
    assert error.value.retry_after >= 1
    scheduler.decide()
    with pytest.raises(QueueFull):
        scheduler.add(_request("f"))
    scheduler.ended(0, "a")
    scheduler.add(_request("f"))


def test_retry_after_follows_what_requests_take() -> None:
    now = [0.0]
    scheduler = _scheduler(places=1, most_waiting=9, clock=lambda: now[0])
    for number in range(30):
        scheduler.add(_request(str(number)))
        scheduler.decide()
        now[0] += 20.0
        scheduler.ended(0, str(number))
    assert 15 <= scheduler.retry_after() <= 20
    for number in range(8):
        scheduler.add(_request(f"w{number}"))
    assert scheduler.retry_after() == 60  # of 180


def test_cancelled() -> None:
    scheduler = _scheduler()
    for name in "abcd":
        scheduler.add(_request(name))
    scheduler.decide()
    assert scheduler.cancel("d")  # it waits
    assert not scheduler.cancel("b")
    assert not scheduler.cancel("unknown")
    scheduler.add(_request("e"))
    decision = scheduler.decide()
    # Free in the same step, and taken.
    assert decision.cancel == [1]
    assert _entered(decision) == [("e", 1)]
    assert scheduler.decide().cancel == []


def test_memory_admits_padded_sequences() -> None:
    small, large = _request("s", 10, 10), _request("l", 500, 12)
    limit = 2 * SIZES.held(2 * BLOCK)
    scheduler = _scheduler(limits=[limit])
    assert scheduler.problem(large) == ""
    assert "10000" in scheduler.problem(_request("x", 9000, 1000))
    for request in (small, large, _request("t", 10, 10)):
        scheduler.add(request)
    # The third would be as wide as the second.
    assert [name for name, _ in _entered(scheduler.decide())] == ["s", "l"]
    assert scheduler.num_waiting == 1
    scheduler.ended(1, "l")
    assert [name for name, _ in _entered(scheduler.decide())] == ["t"]


def test_one_chunk_beside_decode() -> None:
    scheduler = _scheduler(prefill_step=16)
    scheduler.add(_request("long", 40))
    counts = []
    for _ in range(4):
        counts.append(scheduler.decide().prefill.get(0, []))
    # The last token of the prompt is the first to be decoded.
    assert counts == [[(0, 16)], [(0, 16)], [(0, 7)], []]


@pytest.mark.parametrize("waited", range(PATIENCE + 1))
def test_short_prompts_go_first_until_the_oldest_has_waited(waited: int) -> None:
    pending = [Pending(0, 100), Pending(1, 30), Pending(2, 3), Pending(3, 5)]
    chunks = choose_chunks(pending, 16, waited)
    if waited < PATIENCE:
        assert chunks == [(2, 3), (3, 5)]  # padded: 2 x 5
    else:
        assert chunks == [(0, 16)]


def test_no_prompt_starves() -> None:
    scheduler = _scheduler(places=40, most_waiting=100, prefill_step=16)
    scheduler.add(_request("long", 81))  # 5 chunks
    steps = 0
    while not any(place == 0 and not a.left for place, a in scheduler.places.items()):
        scheduler.add(_request(f"s{steps}", 16))
        scheduler.decide()
        steps += 1
        assert steps <= 5 * (PATIENCE + 1) + 1


@pytest.mark.parametrize("most", [1, 8, 64])
def test_a_pass_is_bounded(most: int) -> None:
    pending = [Pending(place, 1 + place * 7 % 40) for place in range(20)]
    chunks = choose_chunks(pending, most, 0)
    assert len(chunks) * max(count for _, count in chunks) <= most
    # Beside others a prompt is processed to its end.
    left = dict(pending)
    assert len(chunks) == 1 or all(left[place] == count for place, count in chunks)


def test_steps_without_a_prompt_are_no_patience() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("first", most=100))
    scheduler.decide()
    for _ in range(PATIENCE + 2):
        assert scheduler.decide().prefill == {}
    scheduler.ended(0, "first")
    # In the same place: it has waited for nothing yet, and the shorter one goes first.
    scheduler.add(_request("long", 50))
    scheduler.add(_request("short", 3))
    assert scheduler.decide().prefill == {0: [(1, 2)]}


def test_what_is_cached_is_not_processed() -> None:
    hits = {0: None, 1: PrefixHit(4, 30)}
    scheduler = _scheduler(limits=[10**9] * 2, find=lambda owner, _: hits[owner])
    scheduler.add(_request("a", 40))
    decision = scheduler.decide()
    (enter,) = decision.enter
    assert (enter.owner, enter.hit) == (1, hits[1])
    assert decision.prefill == {1: [(enter.place, 9)]}


def test_requests_spread_over_ranks() -> None:
    scheduler = _scheduler(places=6, limits=[10**9] * 3)
    for name in "abcdef":
        scheduler.add(_request(name)) if name < "f" else None
    owners = [enter.owner for enter in scheduler.decide().enter]
    assert owners == [0, 1, 2, 0, 1]


def test_the_router_weighs_load_and_prefix() -> None:
    assert choose_rank({0: RankLoad(2, 0, 500), 1: RankLoad(3, 0, 100)}) == 1
    assert choose_rank({0: RankLoad(0, 0, 120), 1: RankLoad(9, 0, 100)}) == 0
    assert choose_rank({2: RankLoad(1, 5, 9), 1: RankLoad(1, 5, 9)}) == 1


def test_a_full_rank_takes_nothing() -> None:
    one = SIZES.batch([20])
    scheduler = _scheduler(limits=[one, 5 * one], places=9, most_waiting=9)
    for name in "abcd":
        scheduler.add(_request(name))
    owners = [enter.owner for enter in scheduler.decide().enter]
    assert sorted(owners) == [0, 1, 1, 1]


def test_a_prefix_is_found_among_many_as_by_looking_at_all() -> None:
    """Also after some have been thrown out; nothing that begins another is kept."""
    random, cache = Random(5), PrefixCache(60)
    kept: list[list[int]] = []  # the one that was used longest ago first

    def common(a: list[int], b: list[int]) -> int:
        pairs = enumerate(zip(a, b, strict=False))
        return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))

    for _ in range(2000):
        tokens = [random.choice((1, 2, 300)) for _ in range(random.randint(1, 7))]
        hit = cache.find(tokens)
        longest = max((common(tokens, other) for other in kept), default=0)
        assert (hit.num_tokens if hit else 0) == longest
        if hit is not None and random.random() < 0.3:
            used = cache.use(hit.entry)
            assert common(tokens, used) == longest
            kept.append(kept.pop(kept.index(used)))
        cache.put(tokens, len(tokens), tokens)
        held = [other for other in kept if other[: len(tokens)] == tokens]
        if held:
            kept.append(kept.pop(kept.index(min(held))))
            continue
        kept = [other for other in kept if tokens[: len(other)] != other]
        while sum(map(len, kept)) + len(tokens) > 60:
            kept.pop(0)
        kept.append(tokens)
        assert (len(cache), cache.num_bytes) == (len(kept), sum(map(len, kept)))


def test_prefixes_are_found_bounded_and_used_in_order() -> None:
    cache = PrefixCache(100)
    cache.put([1, 2, 3, 4], 40, "a")
    cache.put([1, 2, 9], 30, "b")
    assert cache.find([1, 2, 9, 9]) == PrefixHit(1, 3)
    assert cache.find([1, 2, 3]) == PrefixHit(0, 3)
    assert cache.find([7]) is None
    assert cache.use(0) == "a"
    cache.put([5, 5], 40, "c")  # "b" was used longest ago
    assert cache.find([1, 2, 9, 9]) == PrefixHit(0, 2)
    assert cache.num_bytes == 80
    cache.put([1, 2, 3, 4, 5], 50, "d")  # "a" begins it
    assert (len(cache), cache.num_bytes) == (2, 90)
    cache.put([1, 2, 3], 20, "e")  # which it begins
    cache.put([8], 101, "f")  # never
    assert (len(cache), cache.num_bytes) == (2, 90)
    empty = PrefixCache(0)
    empty.put([1], 1, "x")
    assert empty.find([1]) is None
