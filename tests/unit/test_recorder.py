"""The recorder, its files, and placing by them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep import EPConfig
from mlx_ep.loading import choose_placement, expert_sizes
from mlx_ep.moe import RoutingRecorder
from mlx_ep.moe.recorder import LEAST_UNCOUNTED, MOST_UNCOUNTED
from mlx_ep.placement import Placement, RecordedRouting, read_record, write_record
from tests.support.tiny import QWEN3_MOE, make_model

E, K, LAYERS = 6, 2, 3
PLACEMENT = Placement(((0, 1, 2, 3), (3, 4, 5)))


def passes(count: int, tokens: int) -> list[np.ndarray]:
    """Ids of each pass, [layers T K]."""
    random = np.random.default_rng(3)
    keys = random.random((count, LAYERS, tokens, E))
    return list(np.argsort(keys, -1)[..., :K].astype(np.int32))


def recorded(steps: list[np.ndarray], is_apart: bool = False) -> RoutingRecorder:
    recorder = RoutingRecorder([PLACEMENT] * LAYERS, is_apart)
    observers = [recorder.observer(layer) for layer in range(LAYERS)]
    observers[0](mx.array(steps[0][0]))  # before start: not recorded
    recorder.start()
    for step in steps:
        for observe, ids in zip(observers, step, strict=True):
            observe(mx.array(ids))
    recorder.stop()
    observers[0](mx.array(steps[0][0]))
    return recorder


@pytest.mark.parametrize(("count", "tokens"), [(1, 5), (2 * MOST_UNCOUNTED + 3, 1)])
def test_counts_and_coactivations(count: int, tokens: int) -> None:
    steps = passes(count, tokens)
    steps[0][0, 0, 1] = -1
    recorder = recorded(steps)
    expected = np.zeros((LAYERS, E, E), np.int64)
    for step in steps:
        for layer, rows in enumerate(step):
            for row in rows:
                for a in row[row >= 0]:
                    for b in row[row >= 0]:
                        expected[layer, a, b] += 1
    np.testing.assert_array_equal(recorder.coactivations, expected)
    assert (recorder.num_passes, recorder.num_tokens) == (count, count * tokens)
    assert recorder.top_k == K
    recorder.reset()
    assert not recorder.coactivations.any() and not recorder.num_passes


def test_balancedness(caplog: pytest.LogCaptureFixture) -> None:
    """Rows and experts of ranks as the layer serves them."""
    ids = np.array([[[0, 1], [0, 1]], [[0, 4], [0, 4]], [[0, 3], [1, 4]]], np.int32)
    with caplog.at_level(logging.DEBUG, "mlx_ep"):
        recorder = recorded([ids, ids])
    # Layer 0: all rows on rank 0; 1: alike; 2: 0 and 1 on rank 0, 3 and 4 on rank 1.
    assert recorder.balancedness == [((0.5 + 1 + 1) / 3,) * 2] * 2
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0].startswith(
        "[Expert Balancedness] forward_pass_id=0 current_pass_balancedness=0.833 "
        "last_10_average_balancedness=0.833 last_100_average_balancedness=0.833 "
        "last_1000_average_balancedness=0.833 current_pass_activated_balancedness=0.833"
    )
    assert "forward_pass_id=1" in lines[-1]


def test_a_rank_that_computes_alone_says_nothing_of_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = passes(4, 3)
    with caplog.at_level(logging.DEBUG, "mlx_ep"):
        recorder = recorded(steps, is_apart=True)
    assert (recorder.balancedness, caplog.records) == ([], [])
    assert (recorder.num_passes, recorder.num_tokens) == (4, 12)
    np.testing.assert_array_equal(recorder.coactivations, recorded(steps).coactivations)


def test_a_file_and_back(tmp_path: Path) -> None:
    recorder = recorded(passes(4, 3))
    recorder.dump(file := tmp_path / "r.npz")
    record = read_record(file, E)
    np.testing.assert_array_equal(record.coactivations, recorder.coactivations)
    assert record.top_k == K
    with np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["counts"], record.counts)
    described = json.loads((tmp_path / "r.json").read_text())
    assert described["num_tokens"] == 12 and described["num_layers"] == LAYERS
    with pytest.raises(ValueError, match="got the name"):
        recorder.dump(tmp_path / "r.json")
    with pytest.raises(ValueError, match="Nothing was recorded"):
        RoutingRecorder([PLACEMENT] * LAYERS).dump(file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "x"}, '"format": "mlx_ep.routing"'),
        ({"version": 2}, '"version": 1'),
        ({"top_k": 0}, "top_k must be 1 to 6"),
    ],
)
def test_a_wrong_file_is_said(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    file = tmp_path / "r.npz"
    write_record(file, RecordedRouting(np.ones((LAYERS, E, E), np.int64), K))
    with pytest.raises(ValueError, match="of 7 experts"):
        read_record(file, 7)
    described = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**described, **change}))
    with pytest.raises(ValueError, match=match):
        read_record(file, E)
    with pytest.raises(ValueError, match="cannot be read here"):
        read_record(tmp_path / "none.npz", E)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="no record of routing"):
        read_record(file, E)


def test_settings_that_exclude_each_other() -> None:
    for fields, match in (
        ({"replica_memory": "many"}, "number of GB such as"),
        ({"replica_memory": "-1"}, "number of GB such as"),
        ({"replica_memory": "nan"}, "number of GB such as"),
        ({"replica_memory": "1", "ep_size": 2}, "Give one of them"),
        ({"replica_memory": "1", "placement_file": "p.json"}, "Give one of them"),
        ({"ep_size": 2, "placement_file": "r.npz"}, "Give one of them"),
    ):
        with pytest.raises(ValueError, match=match):
            EPConfig(**fields)  # type: ignore[arg-type]
    assert EPConfig(replica_memory="24GB").replica_bytes == 24 * 10**9
    assert EPConfig(replica_memory="0.5").replica_bytes == 5 * 10**8
    with pytest.raises(ValueError, match="say with --memory"):
        choose_placement(EPConfig(replica_memory="auto"), 10, 2, _outline)


def test_copies_within_a_budget() -> None:
    each = expert_sizes(_outline()).expert_bytes
    config = EPConfig(replica_memory=f"{2.5 * each / 1e9:.12f}GB")
    placement = choose_placement(config, 10, 2, _outline)
    assert [placement.num_slots(rank) for rank in range(2)] == [7, 7]
    assert set(range(5)) <= set(placement.rank_experts[0])
    assert "4 copies on all ranks" in placement.describe(0)
    whole = choose_placement(EPConfig(replica_memory="1GB"), 10, 2, _outline)
    assert whole.rank_experts == (tuple(range(10)),) * 2


def test_copies_as_long_as_they_pay() -> None:
    sizes = expert_sizes(_outline())
    room = (sizes.dense_bytes + 8 * sizes.expert_bytes) / 1e9
    config = EPConfig(replica_memory="auto", memory=(room, room))
    placement = choose_placement(config, 10, 2, _outline)
    assert max(placement.num_slots(rank) for rank in range(2)) <= 8
    assert "the busiest rank reads" in placement.describe(0)
    roomy = EPConfig(replica_memory="auto", memory=(1.0, 1.0))
    assert "the next gain is below 1%" in choose_placement(
        roomy, 10, 2, _outline
    ).describe(0)


def test_placed_by_a_record(tmp_path: Path) -> None:
    """Experts that occur together part; the hot ones have copies."""
    both = np.zeros((2, 10, 10), np.int64)
    for a, b, n in ((0, 1, 90), (2, 3, 60), (4, 5, 20), (6, 7, 5), (8, 9, 5)):
        both[:, [a, b, a, b], [a, a, b, b]] = n
    write_record(file := tmp_path / "r.npz", RecordedRouting(both, K))
    plain = choose_placement(EPConfig(placement_file=str(file)), 10, 2, _outline)
    assert [plain.num_slots(rank) for rank in range(2)] == [5, 5]
    for pair in ((0, 1), (2, 3), (4, 5)):
        assert len({int(plain.expert_ranks[expert]) for expert in pair}) == 2
    each = expert_sizes(_outline()).expert_bytes
    memory = f"{1.5 * each / 1e9:.12f}"
    config = EPConfig(placement_file=str(file), replica_memory=memory)
    copied = choose_placement(config, 10, 2, _outline)
    assert not copied.layers  # both layers were used alike
    twice = [e for e in range(10) if len(copied.choice.holders[e]) == 2]
    assert len(twice) == 2 and set(twice) <= {0, 1, 2, 3}
    both[1] = np.diag(np.diag(both[1]))  # no two together: copies pay less
    write_record(file, RecordedRouting(both, K))
    layered = choose_placement(config, 10, 2, _outline)
    assert len(layered.layers) == 2 and layered.layers[0] != layered.layers[1]
    assert layered.rank_experts == plain.rank_experts
    write_record(file, RecordedRouting(both[:1], K))
    with pytest.raises(ValueError, match="the model's 2 MoE layers; it has 1"):
        choose_placement(config, 10, 2, _outline)


def _outline() -> Any:
    return make_model(QWEN3_MOE)


def test_what_is_taken_is_forgotten() -> None:
    """The last passes stay for the next time: they may not be computed yet."""
    steps = passes(20, 1)
    recorder = RoutingRecorder([PLACEMENT] * LAYERS)
    observers = [recorder.observer(layer) for layer in range(LAYERS)]
    recorder.start()
    taken = np.zeros((LAYERS, E, E), np.int64)
    for number, step in enumerate(steps):
        for observe, ids in zip(observers, step, strict=True):
            observe(mx.array(ids))
        if number == 12:
            both, evenness = recorder.take()
            assert len(evenness) == 13 - LEAST_UNCOUNTED
            taken += both
    recorder.stop()
    both, evenness = recorder.take()
    assert len(evenness) == 7 + LEAST_UNCOUNTED
    np.testing.assert_array_equal(taken + both, recorded(steps).coactivations)
    assert not recorder.coactivations.any()
