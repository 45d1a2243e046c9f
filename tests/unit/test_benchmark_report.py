"""How the benchmark counts and what it prints, by hand-made numbers."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_ep import metrics
from mlx_ep.benchmark import legacy, plot, report
from mlx_ep.benchmark.samples import Budget, Samples, geometric_mean, ratio
from mlx_ep.metrics import STAGES, StageTimings, stage_table
from mlx_ep.types import Routing


def record_of(arm, runner="gather", **changes):
    stages = dict.fromkeys(STAGES, 0.0) | {"route": 1e-5, "experts": 4e-4}
    return {
        "level": "layer", "arm": arm, "shape": {"name": "tiny"}, "ranks": 2,
        "transport": "mpi", "tokens": 4, "context": 0, "batch": 1, "phase": "layer",
        "runner": runner, "seconds_median": 0.00123, "seconds_mean": 0.0012,
        "seconds_quartiles": [0.001, 0.002], "samples": 5, "seconds": [0.00123] * 5,
        "ratio_to_tp": 1.5, "collectives": 1, "bytes": 16384,
        "distinct_busiest": 5.125, "communication_share": 0.25,
        "memory_bytes": 189_000_000, "stages": stages,
    } | changes  # fmt: skip


def test_samples():
    samples = Samples((3.0, 1.0, 2.0, 4.0))
    assert samples.median == 2.5 and samples.mean == 2.5
    assert samples.quartiles == (1.75, 3.25)
    assert Samples((7.0,)).quartiles == (7.0, 7.0)
    # Sample by sample: 3/1, 1/2 and 2/4, not 2 / 2.
    assert ratio(Samples((3.0, 1.0, 2.0)), Samples((1.0, 2.0, 4.0))).median == 0.5
    assert geometric_mean([1.0, 4.0, 2.0]) == pytest.approx(2.0)


def test_budget():
    budget = Budget(seconds=10.0, most=50)
    assert [budget.count(s) for s in (0.0, 0.1, 0.5, 2.0, 30.0)] == [50, 50, 20, 5, 3]
    assert Budget(seconds=0.0, most=2).count(1.0) == 2


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_layer_table():
    table = report.layer_table(
        [record_of("tp", ratio_to_tp=1.0), record_of("single")], ["gather"]
    )
    times, costs, legend = table.split("\n\n")
    for part in (times, costs):
        lines = part.splitlines()
        assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert cells_of(times.splitlines()[2]) == [
        "4", "tp", "1.23 ms", "1 ms .. 2 ms", "1.00", "5",
    ]  # fmt: skip
    assert cells_of(costs.splitlines()[2]) == [
        "4", "tp", "1", "16.4 kB", "5.1", "25%", "189 MB",
    ]  # fmt: skip
    assert "n: samples" in legend


@pytest.mark.parametrize("level", ["layer", "e2e"])
def test_tables_fit_80_columns(level):
    """The longest arm, three digits everywhere."""
    numbers = {
        "tokens": 4096, "bytes": 999_000_000, "distinct_busiest": 256.5, "samples": 200,
        "memory_bytes": 999_000_000, "communication_share": 1.0, "ratio_to_tp": 10.25,
        "seconds_median": 0.9999, "seconds_quartiles": [0.9999, 0.9999],
    }  # fmt: skip
    record = record_of("ep-all-to-all", "auto", **numbers)
    record["stages"] = dict.fromkeys(STAGES, 0.123456)
    text = report.layer_table(
        [record | {"legacy_3158": {"ratio": 1.5}}], ["gather", "auto"]
    )
    if level == "e2e":
        record |= {
            "level": "e2e", "phase": "prefill", "batch": 16, "collectives": 2.0,
            "tokens_per_second": 12345.6,
        }  # fmt: skip
        text = report.model_table([record])
    text += "\n" + report.stage_table([record], ["gather", "auto"])
    widest = max(text.splitlines(), key=len)
    assert len(widest) <= 80, widest


def test_no_ratio_without_tp():
    table = report.layer_table([record_of("single", ratio_to_tp=None)], ["gather"])
    assert table.splitlines()[2].count(" - ") == 1


def test_runners_are_told_apart_only_where_there_are_several():
    ours, mlx_lm = record_of("ep-replicated", "auto"), record_of("tp")
    assert report.arm_label(ours, ["auto"]) == "ep-replicated"
    assert report.arm_label(ours, ["gather", "auto"]) == "ep-replicated (auto)"
    assert report.arm_label(mlx_lm, ["gather", "auto"]) == "tp"


def test_model_table_and_points():
    record = record_of(
        "ep-gathered", level="e2e", phase="decode", batch=8, tokens_per_second=1234.5,
        communication_share=None, distinct_busiest=None, collectives=1.5,
    )  # fmt: skip
    assert report.point_label(record) == "decode, batch 8"
    times, costs, _ = report.model_table([record]).split("\n\n")
    assert cells_of(times.splitlines()[2])[:3] == ["decode 8", "ep-gathered", "1234"]
    assert "1.50" in costs.splitlines()[2]


def test_stage_tables():
    table = report.stage_table([record_of("tp"), record_of("single")], ["gather"])
    title, _, _, head, line, *_ = table.splitlines()
    assert title == "us in each stage, T=4" and head.split() == [*STAGES, "all"]
    assert line.split() == ["tp", "10", "0", "0", "400", "0", "0", "410"]
    seconds = dict.fromkeys(STAGES, 0.0) | {"experts": 3e-3, "wait": 1e-3}
    lines = stage_table([seconds, seconds], 4).splitlines()
    assert lines[0].startswith("| us per layer, 4 layers timed | rank 0 | rank 1 |")
    assert "| experts | 750 (75%) | 750 (75%) |" in lines
    assert lines[-1] == "| all | 1000 (100%) | 1000 (100%) |"
    assert "0 (0%)" in stage_table([dict.fromkeys(STAGES, 0.0)], 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5e-6, "2.5 us"), (0.000999, "999 us"), (0.0123, "12.3 ms"), (13.456, "13.5 s")],
)
def test_seconds(seconds, text):
    assert report.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(512, "512 B"), (16384, "16.4 kB"), (2_500_000, "2.5 MB"), (9.5e9, "9.5 GB")],
)
def test_bytes(num_bytes, text):
    assert report.bytes_text(int(num_bytes)) == text


class TestLegacy:
    """ml-explore/mlx#3158: EP = exchange + full; TP = K x shard + all_sum."""

    parts = legacy.Parts(all_sum=1.0, shard=2.0, exchange=3.0, full=4.0)

    def test_by_hand(self):
        assert self.parts.tp(8) == 17.0
        assert self.parts.ep() == 7.0
        assert self.parts.ratio(8) == pytest.approx(7 / 17)
        assert legacy.to_json(self.parts, 8) == {
            "all_sum": 1.0, "shard": 2.0, "exchange": 3.0, "full": 4.0,
            "tp": 17.0, "ep": 7.0, "ratio": pytest.approx(7 / 17),
        }  # fmt: skip

    def test_rows(self):
        """N tokens of top 8 on 2 ranks are 4 N rows of one FFN; at least one."""
        assert legacy.rows_of_full(64, 8, 2) == 256
        assert legacy.rows_of_full(1, 1, 4) == 1

    def test_weights_that_tp_is_charged_for(self):
        """K shards against one expert: K / P, 4x at K=8 on 2 ranks."""

        def weights(expert_width):
            return sum(a * b for a, b in legacy._ffn_shapes(7168, expert_width))

        assert 8 * weights(2048 // 2) / weights(2048) == 4

    def test_column(self):
        records = [
            record_of(arm, legacy_3158={"ratio": 0.32})
            for arm in ("tp", "ep-replicated")
        ]
        lines = report.layer_table(records, ["gather"]).split("\n\n")[2].splitlines()
        assert cells_of(lines[0]) == ["T", "arm", legacy.LABEL]
        assert [cells_of(line) for line in lines[2:]] == [
            ["4", "ep-replicated", "0.32"]
        ]
        assert "how many experts" in legacy.LEFT_OUT


def test_json(tmp_path):
    file = tmp_path / "records.json"
    report.write_json(file, {"command": "x"}, [record_of("tp")])
    content = json.loads(file.read_text())
    assert content["command"] == "x"
    assert content["records"] == [record_of("tp")]


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        plot.check_can_plot()


@pytest.mark.parametrize("level", ["layer", "e2e"])
def test_plot(level, tmp_path):
    plot.check_can_plot()
    points = [(1, "decode"), (4, "prefill")]
    records = [
        record_of(
            arm, tokens=t, batch=t, phase=phase, level=level, tokens_per_second=9.0
        )
        for t, phase in points
        for arm in ("single", "tp", "ep-replicated")
    ]
    # As arms of mlx-lm in level e2e: no stages.
    records[0]["stages"] = dict.fromkeys(STAGES, 0.0)
    file = tmp_path / "plot.png"
    plot.plot_records(file, "a title", records, ["gather"])
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


class TestTimings:
    def test_off_it_does_nothing(self):
        timings = StageTimings()
        value = object()
        timings.start()
        timings.begin(mx.zeros(1))
        no_barrier = lambda: pytest.fail("no barrier")  # noqa: E731
        assert timings.run("route", lambda v: v, value, barrier=no_barrier) is value
        timings.end()
        assert timings == StageTimings()

    def test_a_stage_costs_its_arguments_and_its_result_but_not_the_wait(
        self, monkeypatch
    ):
        clock, evaluated = [0.0], []
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])

        def evaluate(arrays):
            evaluated.append(arrays)
            clock[0] += 1.0

        monkeypatch.setattr(metrics.mx, "eval", evaluate)
        timings = StageTimings(enabled=True)
        x = mx.zeros(1)
        timings.begin(x)  # what the tokens are computed from is not the layer's
        routing = Routing(mx.zeros((1, 1), mx.int32), mx.ones((1, 1)))
        result = timings.run(
            "combine",
            lambda routing, n: routing,
            routing,
            3,
            barrier=lambda: clock.__setitem__(0, clock[0] + 5),
        )
        assert result is routing
        assert timings.seconds == dict.fromkeys(STAGES, 0.0) | {
            "combine": 2.0,
            "wait": 5.0,
        }
        assert [len(arrays) for arrays in evaluated] == [1, 2, 2]

    def test_measure_starts_from_zero_and_turns_off(self):
        timings = StageTimings()
        for _ in range(2):
            with timings.measure() as measured:
                assert measured is timings and timings.enabled
                timings.start()
                timings.begin(mx.zeros(1))
                timings.run("experts", mx.zeros, 3)
                timings.end()
            assert timings.layer_calls == 1
            assert timings.seconds["experts"] > 0
            assert set(timings.seconds) == set(STAGES)
        assert not timings.enabled
