"""Steps in two micro-batches: where they are cut, what is started in which order."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

import mlx_ep
from mlx_ep.api.overlap import OverlapTable
from mlx_ep.config import EPConfig
from mlx_ep.exchange import InFlight
from mlx_ep.models.halved_cache import HalvedCache, why_not_halved
from mlx_ep.models.two_batch import LEAST_PROMPT, Choose, cut_step
from mlx_ep.moe import MixtureOfExperts, RebalanceRule
from mlx_ep.moe.overlap import Operation, Turns
from tests.support import tiny
from tests.support.architectures import ARCHITECTURES, make_model

MODELS = {
    "qwen2_moe": tiny.QWEN2_MOE,
    "deepseek_v3": tiny.DEEPSEEK_V3,
    "gpt_oss": tiny.GPT_OSS,  # caches that rotate
    "longcat": tiny.LONGCAT,
}


def test_a_result_is_received_once() -> None:
    x = mx.ones(3)
    with InFlight() as flight:
        receive = flight.start(x, x, name="dispatch")
        assert receive() is x
        with pytest.raises(RuntimeError, match="of dispatch has been received already"):
            receive()


def test_a_result_is_not_left() -> None:
    with (
        pytest.raises(RuntimeError, match="combine was started and never received"),
        InFlight() as flight,
    ):
        flight.start(0, mx.ones(3), name="dispatch")()
        flight.start(0, mx.ones(3), name="combine")


def test_an_error_inside_is_not_hidden_by_what_is_left() -> None:
    with pytest.raises(KeyError), InFlight() as flight:
        flight.start(0, mx.ones(3), name="combine")
        raise KeyError


def test_two_results_at_most() -> None:
    with InFlight() as flight:
        held = [flight.start(n, mx.ones(3), name=n) for n in ("a", "b")]
        with pytest.raises(RuntimeError, match=r"at most 2 .*got a and b, and then c"):
            flight.start("c", mx.ones(3), name="c")
        held[0]()
        assert flight.start("c", mx.ones(3), name="c")() == "c"
        held[1]()


def layers(name: str, count: int, turns: Turns, order: list[str]) -> str:
    """A pass of so many layers with one operation each."""
    x = mx.ones(3)
    for layer in range(count):
        order.append(f"{name}{layer}")
        turns.take(Operation(name, layer, 3, x, (x + layer,)))
    return name


def test_passes_take_turns() -> None:
    """Also where one has more layers; each pass goes on when the other has started."""
    order: list[str] = []
    turns, entered = Turns(), []
    passes = [
        partial(layers, name, n, turns, order) for name, n in (("a", 2), ("b", 4))
    ]
    assert turns.run(passes, entered.append) == ["a", "b"]
    assert order == ["a0", "b0", "a1", "b1", "b2", "b3"]
    assert entered == [0, 1, 0, 1, 0, 1, 1, 1]


def test_where_one_pass_fails_the_other_is_ended() -> None:
    ended, turns = [], Turns()

    def other() -> None:
        try:
            layers("a", 3, turns, [])
        finally:
            ended.append(True)

    def fails() -> None:
        layers("b", 1, turns, [])
        raise KeyError("b")

    with pytest.raises(KeyError):
        turns.run([other, fails], lambda part: None)
    assert ended == [True]


@pytest.mark.parametrize("length", [1, LEAST_PROMPT - 1, LEAST_PROMPT, 17, 1000])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_cuts(rows: int, length: int) -> None:
    cut = cut_step(rows, length)
    assert sum(cut.tokens) == rows * length
    if length == 1:
        assert (cut.kind, cut.first) == ("decode", rows // 2)
        assert cut.tokens == (rows // 2, rows - rows // 2)
    elif length < LEAST_PROMPT:
        assert cut.first == 0
    else:  # no side has less than 48% once there are enough
        assert cut.kind == "prompt"
        assert min(cut.tokens) >= (0.48 if length > 24 else 0.46) * sum(cut.tokens)


def steps_of(model, overlap: str) -> list[np.ndarray]:
    """A prompt in two chunks, then tokens one by one; then a batch that changes."""
    outputs = []
    tokens = mx.array(np.random.default_rng(0).integers(2, 300, (3, 40)))
    cache = make_prompt_cache(model)
    for part in mx.split(tokens[:1], [33, 38, 39], axis=1):
        outputs.append(model(part, cache=cache))
    single = [make_prompt_cache(model) for _ in range(3)]
    batch = [layer[0].merge(list(layer)) for layer in zip(*single, strict=True)]
    outputs.append(model(tokens[:, :20], cache=batch))
    outputs.append(model(tokens[:, 20:21], cache=batch))
    outputs.append(model(tokens[:, 21:22], cache=batch))
    other = [c.merge([c]) for c in make_prompt_cache(model)]
    model(tokens[:1, :17], cache=other)
    model(tokens[:1, 17:18], cache=other)
    for own, more in zip(batch, other, strict=True):
        own.extend(more)
    four = mx.concatenate([tokens[:, 22:23], tokens[:1, 18:19]])
    outputs.append(model(four, cache=batch))
    for own in batch:
        own.filter([1, 3])
    outputs.append(model(four[2:], cache=batch))
    alone = [own.extract(1) for own in batch]
    outputs.append(model(tokens[2:, :1], cache=alone))
    assert isinstance(batch[0], HalvedCache) == (overlap == "two")
    if overlap == "two":
        assert batch[0].sizes == [1, 1]
        assert batch[0].nbytes == sum(part.nbytes for part in batch[0].parts) > 0
    return [np.array(output) for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_whole_steps(name: str) -> None:
    """Other shapes of matrices may round differently, and no more than that."""
    found = {}
    for overlap in ("none", "two"):
        model = tiny.make_model(MODELS[name])
        config = EPConfig(overlap=overlap, warmup=False)
        mlx_ep.parallelize(model, config=config)
        found[overlap] = steps_of(model, overlap)
    for step, (plain, cut) in enumerate(zip(*found.values(), strict=True)):
        np.testing.assert_allclose(cut, plain, rtol=0, atol=2e-4, err_msg=str(step))
        assert (cut.argmax(-1) == plain.argmax(-1)).all(), step


def test_the_model_stays_one_of_its_class() -> None:
    plain = tiny.make_model(tiny.QWEN2_MOE)
    model = tiny.make_model(tiny.QWEN2_MOE)
    mlx_ep.parallelize(model, config=EPConfig(overlap="two", warmup=False))
    assert isinstance(model, type(plain))
    assert type(model).__module__ == type(plain).__module__


def test_caches_that_cannot_be_cut_are_named(monkeypatch) -> None:
    ok = [KVCache(), RotatingKVCache(8), CacheList(KVCache(), ArraysCache(2))]
    assert why_not_halved(ok) == ""
    bad = [KVCache(), CacheList(KVCache(), ConcatenateKVCache())]
    assert "a ConcatenateKVCache cannot be cut" in why_not_halved(bad)
    model = tiny.make_model(tiny.QWEN2_MOE)
    model.make_cache = lambda: [ConcatenateKVCache() for _ in model.layers]
    with pytest.raises(ValueError, match=r"ConcatenateKVCache cannot .*single"):
        mlx_ep.parallelize(model, config=EPConfig(overlap="two", warmup=False))


@pytest.mark.parametrize("overlap", ["two", "auto"])
def test_what_it_does_not_go_with(overlap) -> None:
    with pytest.raises(ValueError, match="two passes of a step, between which"):
        RebalanceRule.of(EPConfig(overlap=overlap, rebalance_every=3), 2)
    with pytest.raises(ValueError, match="MixtureOfExperts takes none or single"):
        MixtureOfExperts(32, 32, 4, 2, config=EPConfig(overlap=overlap))


def test_halves_are_made_anew_only_where_the_batch_changed() -> None:
    cache = BatchKVCache([0, 0, 0])
    cache.update_and_fetch(mx.ones((3, 1, 4, 2)), mx.ones((3, 1, 4, 2)))
    halved = HalvedCache(cache, 3)
    first, second = halved.cut(1)
    assert (first.keys.shape[0], second.keys.shape[0]) == (1, 2)
    assert halved.cut(1) == (first, second)
    halved.filter([1, 2])  # the first half is empty
    assert halved.sizes == [2]
    assert [part.keys.shape[0] for part in halved.cut(1)] == [1, 1]


def steady(**medians: float) -> dict[str, tuple[float, ...]]:
    """A host that nobody else uses."""
    return {mode: (seconds,) * 5 for mode, seconds in medians.items()}


def test_what_loses_is_not_chosen() -> None:
    table = OverlapTable(
        {
            ("decode", 1): steady(none=1.0, single=0.985),
            ("decode", 8): steady(none=1.0, single=0.9, two=0.8),
            ("prompt", 16): steady(none=1.0, single=0.96, two=1.5),
        }
    )
    chosen = [table.choose("decode", n) for n in (1, 7, 8, 500)]
    assert chosen == ["none", "none", "two", "two"]
    assert table.choose("prompt", 2) == table.choose("prompt", 99) == "single"
    assert OverlapTable({}).choose("prompt", 9) == "none"
    text = " ".join(table.explain().split())
    assert "| decode, 1 tokens | none | 1000.000 | 985.000 (5/5) | - |" in text
    assert "| decode, 8 tokens | two |" in text


def test_a_gain_is_of_neighbours() -> None:
    """The host slows down by half while it is measured; the mode gains all the time."""
    none = (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)
    faster = tuple(0.9 * one for one in none)
    late = faster[3:] + faster[:3]  # the same times, of other turns

    def chosen(two: tuple[float, ...]) -> str:
        table = OverlapTable({("decode", 1): {"none": none, "two": two}})
        return table.choose("decode", 1)

    assert (chosen(faster), chosen(late)) == ("two", "none")


def test_what_is_not_clear_is_not_chosen() -> None:
    """A median that gains is not enough: it has to gain turn after turn."""

    def chosen(gaining: int, turns: int) -> str:
        two = (0.5,) * gaining + (1.2,) * (turns - gaining)
        samples = {"none": (1.0,) * turns, "two": two}
        return OverlapTable({("decode", 2): samples}).choose("decode", 2)

    assert [chosen(n, 5) for n in (3, 4, 5)] == ["none", "none", "two"]
    assert [chosen(n, 21) for n in (11, 14, 15)] == ["none", "none", "two"]


def turns_taken(monkeypatch, took: dict[str, tuple[float, ...]]) -> int:
    """Turns of one size on a host where the steps of each mode take so long."""
    monkeypatch.setattr("mlx_ep.api.overlap.SIZES", {"decode": (2,), "prompt": ()})
    clock, mode, count = [0.0], ["none"], dict.fromkeys(took, 0)

    def step() -> None:
        times = took[mode[0]]
        clock[0] += times[count[mode[0]] % len(times)]
        count[mode[0]] += 1

    def always(wanted: str) -> Choose:
        mode[0] = wanted
        return lambda kind, num_tokens: wanted

    monkeypatch.setattr("mlx_ep.api.overlap.step_of", lambda *_: step)
    monkeypatch.setattr("mlx_ep.api.overlap.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("mlx_ep.api.overlap.always", always)
    model = tiny.make_model(tiny.QWEN2_MOE)
    mlx_ep.parallelize(model, config=EPConfig(overlap="auto", warmup=False))
    samples = model.expert_parallel.overlaps.samples["decode", 2]
    assert {len(times) for times in samples.values()} == {count["none"] - 1}
    return count["none"] - 1


def test_more_is_measured_where_it_is_not_clear(monkeypatch) -> None:
    """Of steps of 1/16 s half a second has 8, and a second more has 16."""
    slow, fast = (1 / 16,), (1 / 32,)
    mixed = tuple(part / 128 for part in (6, 6, 7, 9, 9))
    with monkeypatch.context() as patch:
        loses = {"none": fast, "single": slow, "two": slow}
        assert turns_taken(patch, loses) == 8
    with monkeypatch.context() as patch:
        gains = {"none": slow, "single": fast, "two": slow}
        assert turns_taken(patch, gains) == 8
    with monkeypatch.context() as patch:
        unclear = {"none": slow, "single": mixed, "two": slow}
        assert turns_taken(patch, unclear) == 24


def test_noise_is_rarely_taken_for_a_gain() -> None:
    """Of modes that gain nothing on a host whose steps vary by a third."""
    rng, turns, hosts = np.random.default_rng(0), 21, 400
    taken = 0
    for _ in range(hosts):
        times = rng.lognormal(0.0, 0.3, (3, turns))
        samples = dict(
            zip(("none", "single", "two"), map(tuple, times.tolist()), strict=True)
        )
        taken += OverlapTable({("decode", 2): samples}).choose("decode", 2) != "none"
    assert taken / hosts < 0.1


def test_auto_measures_every_way(monkeypatch) -> None:
    monkeypatch.setattr("mlx_ep.api.overlap.SIZES", {"decode": (1, 2), "prompt": (16,)})
    model = tiny.make_model(tiny.QWEN2_MOE)
    mlx_ep.parallelize(model, config=EPConfig(overlap="auto", warmup=False))
    table = model.expert_parallel.overlaps
    assert list(table.seconds) == [("decode", 1), ("decode", 2), ("prompt", 16)]
    assert set(table.seconds["decode", 2]) == {"none", "single", "two"}
    assert model.expert_parallel.counters.layer_calls == 0
    plain = tiny.make_model(tiny.QWEN2_MOE)
    tokens = mx.arange(9)[None]
    np.testing.assert_allclose(
        np.array(model(tokens)), np.array(plain(tokens)), rtol=0, atol=2e-4
    )


def test_hidden_milliseconds_are_shown() -> None:
    """A step is timed stage by stage, the next one with its overlap, and so on."""
    for overlap in ("single", "two"):
        model = tiny.make_model(tiny.QWEN2_MOE)
        mlx_ep.parallelize(model, config=EPConfig(overlap=overlap, warmup=False))
        group = model.expert_parallel.group
        group.timings.enabled = True
        for _ in range(4):
            mx.eval(model(mx.arange(32)[None], cache=make_prompt_cache(model)))
        ((tokens, alone, exposed),) = group.overlap.exposure.per_layer()
        assert tokens == (16 if overlap == "two" else 32)
        assert alone > 0 and exposed >= 0


def prompt_and_decode(model) -> list[np.ndarray]:
    """Logits of a prompt, a token behind it, and a step of three sequences."""
    caches = make_prompt_cache(model)
    tokens = mx.array(np.random.default_rng(3).integers(2, 300, (3, 41)))
    outputs = [model(tokens[:1, :40], cache=caches)]
    outputs.append(model(tokens[:1, 40:], cache=caches))
    singles = [make_prompt_cache(model) for _ in range(3)]
    if all(hasattr(each, "merge") for each in caches):
        layers = zip(*singles, strict=True)
        batch = [layer[0].merge(list(layer)) for layer in layers]
        outputs.append(model(tokens[:, :20], cache=batch))
        outputs.append(model(tokens[:, 20:21], cache=batch))
    return [np.array(output.astype(mx.float32)) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "muse_spark"])
def test_every_architecture_gives_the_same(name: str) -> None:
    """Or is refused by the name of its cache."""
    found = {}
    for overlap in ("none", "two"):
        model = make_model(ARCHITECTURES[name])
        config = EPConfig(overlap=overlap, warmup=False)
        try:
            mlx_ep.parallelize(model, config=config)
        except ValueError as error:
            assert overlap == "two" and "cannot be cut between sequences" in str(error)
            return
        found[overlap] = prompt_and_decode(model)
    for step, (plain, cut) in enumerate(zip(*found.values(), strict=True)):
        np.testing.assert_allclose(cut, plain, rtol=0, atol=3e-3, err_msg=str(step))
