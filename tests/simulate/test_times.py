"""Tables, attention, links and what a step of a bundle adds up to."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mlx_ep.config import EPConfig
from mlx_ep.exchange import STRATEGIES, ExchangeShape, layer_traffic
from mlx_ep.simulate.cluster import LinkLevel
from mlx_ep.simulate.links import gather_ns, pairs_ns, reduce_ns, scatter_ns
from mlx_ep.simulate.model import ModelSizes, read_model
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.times.attention import AttentionTable, Skew, chunk_equivalent
from mlx_ep.simulate.times.exchanges import exchange_ns
from mlx_ep.simulate.times.tables import Line, Surface, sum_of_lines
from mlx_ep.types import TokenCounts
from tests.support.simulate.data import (
    MOE,
    attention_us,
    cluster,
    instance,
    make_folder,
    trace_lines,
    two_members,
    write_trace,
)
from tests.support.simulate.running import make_engine

LINK = LinkLevel(16.0, 20_000.0)


def test_line() -> None:
    line = Line([(4, 10.0), (1, 1.0), (2, 2.0), (2, 4.0)])
    assert [line.at(x) for x in (0, 1, 1.5, 2, 3, 4, 6)] == [1, 1, 2, 3, 6.5, 10, 17]
    values = np.array([0.0, 1.5, 3, 6])
    assert line(values).tolist() == [line.at(x) for x in values.tolist()]


def test_lines_do_not_fall_below_what_was_measured() -> None:
    """Noise at the end of a table does not go on beyond it."""
    line = Line([(1, 5.0), (2, 9.0), (3, 6.0)])
    assert line.at(100) == 5 and line(np.array([100.0])).tolist() == [5]


def test_sum_of_lines_is_exact_between_points() -> None:
    one, two = Line([(1, 1.0), (10, 4.0)]), Line([(1, 0.0), (5, 8.0), (10, 0.0)])
    total = sum_of_lines([(2.0, one), (1.0, two)])
    for value in (1, 3, 5, 7.5, 10):
        assert total.at(value) == pytest.approx(2 * one.at(value) + two.at(value))


def test_surface() -> None:
    """Linear in both where it was measured; in proportion below the fewest experts."""
    points = [
        (t, e, 3 + 2.0 * e + 0.05 * t)
        for t in (1, 2, 4, 8, 64)
        for e in (2, 4, 8, 16)
        if e <= 2 * t
    ]
    surface = Surface(points)
    tokens, experts = np.array([8.0, 36, 64, 100]), np.array([16.0, 5, 3, 12])
    assert surface(tokens, experts) == pytest.approx(3 + 2 * experts + 0.05 * tokens)
    half = surface(np.array([64.0]), np.array([1.0]))
    assert half == pytest.approx(0.5 * surface(np.array([64.0]), np.array([2.0])))
    # One token: only two experts were measured; four take as much as twice two.
    assert surface(np.array([1.0]), np.array([4.0]))[0] == pytest.approx(2 * 7.05)


def _table(drop: float = 0.0) -> AttentionTable:
    chosen = random.Random(3)
    points = []
    for chunk in (0, 16, 128, 512):
        for before in (0, 64, 512) if chunk else (0,):
            for decodes in (0, 1, 8, 32):
                for keys in (16, 128, 256, 1024) if decodes else (0,):
                    inner = before == 64 and keys in (128, 256)
                    if (chunk or decodes) and not (inner and chosen.random() < drop):
                        time = attention_us(chunk, before, decodes, keys)
                        points.append((chunk, before, decodes, keys, time))
    return AttentionTable(points)


@pytest.mark.parametrize("drop", [0.0, 0.7])
def test_attention_between_points(drop: float) -> None:
    """A function that is linear in each number comes out exactly, also with gaps."""
    table, chosen = _table(drop), random.Random(1)
    for _ in range(50):
        chunk = chosen.choice([0, chosen.uniform(16, 512)])
        decodes = chosen.uniform(1, 40)
        before = chosen.uniform(0, 600) if chunk else 0
        keys = np.array([chosen.uniform(16, 2000) for _ in range(3)])
        expected = [attention_us(chunk, before, decodes, k) for k in keys]
        assert table(chunk, before, decodes, keys) == pytest.approx(expected)


def test_short_chunks_run_the_kernel_of_chunks() -> None:
    """Between no chunk and the shortest there is no line: another kernel runs."""
    table, keys = _table(), np.array([100.0])
    short, plain = table(2, 0, 8, keys), table(0, 0, 8, keys)
    assert short == table(16, 0, 8, keys)
    assert plain < short
    assert table(0, 0, 0, keys).tolist() == [0]


def test_chunk_equivalent() -> None:
    assert chunk_equivalent([(100, 50)]) == (100, 50)
    # Two of 100 without context: the scores of one of 141 tokens.
    tokens, before = chunk_equivalent([(100, 0), (100, 0)])
    assert tokens == pytest.approx(np.sqrt(2 * 2 * 100 * 50)) and before == 0
    tokens, before = chunk_equivalent([(100, 300), (100, 100)])
    assert tokens * (before + tokens / 2) == 100 * 350 + 100 * 150


def test_skew_buckets() -> None:
    skew = Skew(
        {
            (0, "n<=8", "sr<=40%", "kvB<=1k", "kp=0"): 0.5,
            (16, "n<=8", "sr<=40%", "kvB<=1k", "kp<=512"): 0.25,
        }
    )
    assert skew.alpha(20, 8, 0.4, 1024, 1, True) == 0.25
    assert skew.alpha(20, 9, 0.4, 1024, 1, True) == 0.0
    assert skew.alpha(20, 8, 0.4, 1024, 0, True) == 0.0
    assert skew.alpha(0, 8, 0.2, 1000, 0, False) == 0.5
    assert skew.alpha(0, 8, 0.2, 1000, 0, True) == 0.0  # a captured graph


def test_collectives_of_rings() -> None:
    assert gather_ns([(2, LINK)], 1600) == 20_000 + 100
    assert scatter_ns([(4, LINK)], 1600) == 3 * (20_000 + 100)
    assert reduce_ns([(2, LINK)], 1600) == 2 * (20_000 + 50)
    assert gather_ns([(1, LINK)], 1600) == 0
    # Over nodes first, then inside, with what came from the other node as well.
    levels = [(2, LINK), (2, LinkLevel(128.0, 500.0))]
    assert gather_ns(levels, 1280) == 20_000 + 80 + 500 + 20
    assert pairs_ns([(2, LINK)], 1600) == 20_000 + 100


def _bundle_step(
    folder: Path, content: dict[str, object], batches: list[StepBatch], *flags: str
) -> float:
    """us of one step of the first group."""
    make_folder(folder, c=content)
    trace = write_trace(folder / "t.jsonl", trace_lines(1))
    engine = make_engine(folder / "c.json", trace, "--no-graphs", *flags)
    return float(engine.groups[0]._times.stage_ns(batches, 1, 0).sum()) / 1e3


def test_step_of_one_device(tmp_path: Path) -> None:
    """Every layer of the bundle is counted, as often as it runs."""
    took = _bundle_step(tmp_path, cluster(instance()), [StepBatch(decodes=[100, 100])])
    at = {name: 1 + place + 0.2 for place, name in enumerate(_LAYERS)}
    inside = sum(at[name] for name in _LAYERS[2:6]) + 2 * at["layernorm"]
    # Two tokens take 2 of 16 experts each, those of one rank: 3.75 different ones.
    experts = 3 + 2 * 3.75 + 0.05 * 2
    layers = 4 * (inside + attention_us(0, 0, 2, 100) + experts)
    once = at["embedding"] + at["final_layernorm"] + (5 + 0.3 * 2) + (5 + 0.1 * 2)
    assert took == pytest.approx(layers + once, abs=0.001)


_LAYERS = ["embedding", "layernorm", "qkv_proj", "qk_norm", "rotary_emb", "o_proj"]
_LAYERS += ["final_layernorm"]


def test_long_sequences_take_longer(tmp_path: Path) -> None:
    """Without graphs: two of eight are much longer, alpha is 0.5."""
    content = cluster(instance())
    even = _bundle_step(tmp_path, content, [StepBatch(decodes=[250] * 8)])
    uneven = _bundle_step(tmp_path, content, [StepBatch(decodes=[100] * 6 + [700] * 2)])
    longest = attention_us(0, 0, 8, 700) - attention_us(0, 0, 8, 250)
    assert uneven - even == pytest.approx(4 * 0.5 * longest, abs=0.01)


def test_communication_follows_tokens(tmp_path: Path) -> None:
    """With --expert-exchange none the exchange is left out, and nothing else."""
    batches = [StepBatch(prefills=[(64, 0)]), StepBatch(decodes=[30] * 7)]
    content = two_members()
    flags = ("--expert-exchange", "none")
    moved = _bundle_step(tmp_path, content, batches)
    moved -= _bundle_step(tmp_path, content, batches, *flags)
    row, words = 64 * 2, 16 * 2  # D, E numbers of 2 bytes
    expected = 2 * 2000 + 64 * (row + words) / 16 + 64 * row / 16
    assert moved == pytest.approx(4 * expected / 1e3, abs=0.002)
    # An idle member runs one token, and all wait for the longest.
    idle = _bundle_step(tmp_path, content, [batches[0], StepBatch()], *flags)
    busy = _bundle_step(tmp_path, content, batches, *flags)
    assert 0 < busy - idle < 4 * 10


@pytest.mark.parametrize("name", ["allgather", "gathered", "all_to_all", "replicated"])
def test_exchanges_follow_active_tokens_and_not_weights(
    name: str, tmp_path: Path
) -> None:
    """Ten times the experts' width moves nothing more; ten times the tokens as many
    times the bytes, less what a message costs.
    """
    sizes = []
    for width in (32, 320):
        file = tmp_path / f"{width}.json"
        file.write_text(json.dumps(MOE | {"moe_intermediate_size": width}))
        sizes.append(read_model("m", file))
    assert sizes[1].expert_weights == 10 * sizes[0].expert_weights
    levels, settings = [(2, LinkLevel(16.0, 0.0))], EngineSettings()

    def took(tokens: int, model: ModelSizes = sizes[0]) -> float:
        return exchange_ns(name, levels, [tokens] * 2, 2, model, settings)

    assert took(64, sizes[1]) == took(64)
    # Beyond 64 tokens in one mode of all_to_all.
    assert took(1280) == pytest.approx(10 * took(128), rel=1e-2)
    assert 0 < took(1) < took(2) / 1.9


def test_activated_experts_drive_latency(tmp_path: Path) -> None:
    """As many tokens take longer where they choose more different experts."""
    weights = tmp_path / "weights.json"
    batch = [StepBatch(decodes=[100] * 8)]
    took = {}
    for chosen in (2, 4, 16):
        weights.write_text(json.dumps([1.0] * chosen + [0.0] * (16 - chosen)))
        flags = ("--expert-routing-policy", "CUSTOM", "--expert-routing-file")
        took[chosen] = _bundle_step(
            tmp_path, cluster(instance()), batch, *flags, str(weights)
        )
    # 2 us for an expert, in each of 4 layers.
    assert took[4] - took[2] > 4 * 2 * 1.5
    assert took[16] - took[4] > 4 * 2 * 5
    # Twice the tokens with the same two experts: fewer than two experts' worth.
    weights.write_text(json.dumps([1.0] * 2 + [0.0] * 14))
    more = _bundle_step(
        tmp_path,
        cluster(instance()),
        [StepBatch(decodes=[100] * 16)],
        *flags,
        str(weights),
    )
    attention = 4 * (attention_us(0, 0, 16, 100) - attention_us(0, 0, 8, 100))
    assert more - attention - took[2] < took[16] - took[4]


def test_steps_are_padded_to_graphs(tmp_path: Path) -> None:
    make_folder(tmp_path, c=two_members())
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(1))
    times = make_engine(tmp_path / "c.json", trace).groups[0]._times
    assert times._padded([1, 3]) == [4, 4]
    assert times._padded([30, 9]) == [32, 32]
    # No graph is so long: nobody is padded.
    assert times._padded([300, 9]) == [300, 9]


@pytest.mark.parametrize("name", ["gathered", "all_to_all", "replicated"])
def test_exchanges_of_this_package(name: str, tmp_path: Path) -> None:
    """Time is that of the collectives that the strategy says it starts."""
    model = _model(tmp_path)
    levels = [(2, LINK)]
    found = exchange_ns(name, levels, [40, 8], 2, model, EngineSettings())
    counts = (48, 48) if name == "replicated" else (40, 8)
    shape = ExchangeShape(
        tokens=TokenCounts(counts), width=64, top_k=2, itemsize=2, sum_itemsize=4,
        transport="jaccl",
    )  # fmt: skip
    traffic = layer_traffic(STRATEGIES.create(EPConfig(strategy=name)), shape)
    assert found >= len(traffic.collectives) * LINK.latency
    more = exchange_ns(name, levels, [80, 16], 2, model, EngineSettings())
    assert more > found
    assert exchange_ns("none", levels, [40, 8], 2, model, EngineSettings()) == 0


def _model(folder: Path) -> ModelSizes:
    file = folder / "m.json"
    file.write_text(json.dumps(MOE))
    return read_model("m", file)
