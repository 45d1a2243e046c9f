"""A draft whose experts a runner of this package runs, without a collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_ep.api import has_routed_experts, run_alone, runner_problem
from mlx_ep.comm import Comm, broadcast_object, gather_objects
from mlx_ep.comm.alone import AloneComm
from mlx_ep.experts import RUNNERS
from mlx_ep.loading import find_model
from mlx_ep.rows import uses_metal
from tests.support import tiny


def test_one_rank_is_a_group() -> None:
    comm, x = AloneComm(), mx.arange(6).reshape(3, 2)
    assert isinstance(comm, Comm) and (comm.rank, comm.size) == (0, 1)
    for operation in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        assert getattr(comm, operation)(x) is x
    assert comm.all_to_all_v(x, [3], [3]) is x and comm.broadcast(x) is x
    assert gather_objects(comm, {"a": 1}) == [{"a": 1}]
    assert broadcast_object(comm, "b") == "b"
    with pytest.raises(ValueError, match="One rank keeps all 3 rows"):
        comm.all_to_all_v(x, [2], [2])
    with pytest.raises(ValueError, match="rank 0 only"):
        comm.broadcast(x, 1)


@pytest.mark.parametrize("runner", ["gather", "blas"])
def test_the_runner_runs_the_experts(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the logits are those of mlx-lm's own block."""
    path = find_model("jargon-moe")
    tokens = mx.array([[3, 5, 7, 11]])
    expected = np.array(load_model(path)[0](tokens))
    model = run_alone(load_model(path)[0], runner)
    rows = {name: _count_rows(name, monkeypatch) for name in ("gather", "blas")}
    found = np.array(model(tokens))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert rows[runner] and not any(rows[n] for n in rows if n != runner)


def _count_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the rows of each call of a runner."""
    kind: Any = RUNNERS[name]
    seen: list[int] = []
    run = kind.partial_sum

    def counting(self: Any, rows: Any, *rest: Any) -> Any:
        seen.append(len(rows.x))
        return run(self, rows, *rest)

    monkeypatch.setattr(kind, "partial_sum", counting)
    return seen


def test_a_draft_without_experts_is_refused(tmp_path: Path) -> None:
    dense = {**tiny.DENSE, "model_type": "qwen3", "num_hidden_layers": 1}
    tiny.save_checkpoint(tmp_path, dense)
    model = load_model(tmp_path)[0]
    assert not has_routed_experts(model)
    with pytest.raises(
        ValueError, match=r"for routed experts, and mlx_lm\.models\.qwen3"
    ):
        run_alone(model, "gather")


def test_what_a_runner_cannot_run_is_known_before_weights_are_read() -> None:
    model = load_model(find_model("jargon-moe"), lazy=True)[0]
    for runner in ("auto", "gather", "blas"):
        assert runner_problem(model, runner) == ""
    plain = tiny.make_model(tiny.QWEN3_MOE)
    plain.set_dtype(mx.bfloat16)
    assert runner_problem(plain, "blas") == ""
    if uses_metal():
        assert runner_problem(plain, "metal") == runner_problem(plain, "gather") == ""
    else:
        assert "through Metal" in runner_problem(model, "metal")
        assert "float32 only on a CPU" in runner_problem(plain, "gather")
