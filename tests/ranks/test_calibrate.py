"""``mlx_ep.calibrate`` on real ranks: a profile that the cost model can use."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_ep.calibrate import chosen_packings, chosen_widths
from mlx_ep.cost.profile import Profile, read_profile
from mlx_ep.cost.profile_store import find_calibrated
from mlx_ep.cost.shape import named_layer
from mlx_ep.cost.step import ARMS, layer_cost
from mlx_ep.measure.costs import PACKINGS
from mlx_ep.types import Packing
from tests.support.ranks import run_commands

pytestmark = pytest.mark.requires("ranks")

COMMAND = [sys.executable, "-m", "mlx_ep.calibrate"]


def test_two_ranks_write_one_profile(tmp_path: Path) -> None:
    ranks = run_commands(
        2,
        [*COMMAND, "--quick", "--ranks", "2"],
        env={"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    # What a quick run found is no profile that a command would take for this cluster.
    cache = tmp_path / "mlx_ep"
    assert find_calibrated(cache, 2) is None
    (file,) = (cache / "profiles-quick").glob("ring-2-*.json")
    assert f"written to {file}" in ranks[0].stdout
    assert "memory_bandwidth" in ranks[0].stdout and not ranks[1].stdout.strip()
    profile = read_profile(file)
    _check(profile)
    link = profile.link()
    assert link.transport == "ring" and link.topology == "ring"
    assert set(link.tables) == {
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all",
    }  # fmt: skip
    for table in link.tables.values():
        assert table.ranks == 2
        assert all(0 < s < math.inf for s in table.seconds)
    layer = named_layer("16,512,256,4", Packing.affine(4, 64, "float32"), itemsize=4)
    for arm in ARMS:
        cost = layer_cost(profile, layer, arm, tokens=8, num_ranks=2)
        assert 0 < cost.seconds < math.inf
        is_own = arm in ("single", "tp")  # mlx-lm's block, not this package's runners
        assert cost.runner in (("mlx-lm",) if is_own else ("gather", "blas"))


def _check(profile: Profile) -> None:
    for item in fields(Profile):
        if "unit" not in item.metadata:
            continue
        number = getattr(profile, item.name)
        # What is left of a difference may be nothing.
        is_difference = item.name in (
            "block_seconds", "step_seconds", "layer_seconds", "loop_seconds",
            "sequence_seconds", "loop_layer_seconds", "score_seconds",
            "prompt_score_seconds", "element_seconds", "logit_seconds",
        )  # fmt: skip
        assert math.isfinite(number), item.name
        assert number > 0 or (is_difference and number == 0), item.name
        assert profile.source(item.name) == "measured by mlx_ep.calibrate"
    runners = {key.partition("|")[0] for key in profile.experts}
    assert runners == {"mlx-lm", "gather", "blas"}
    for cost in [*profile.experts.values(), *profile.dense.values()]:
        assert len(cost.rows) >= 2
        assert all(0 <= s < math.inf for s in cost.seconds)
        assert max(cost.seconds) > 0


@pytest.mark.slow
def test_one_rank_writes_to_the_cache_folder(tmp_path: Path) -> None:
    (rank,) = run_commands(
        1,
        [*COMMAND, "--packings", "affine4", "--widths", "256,256"],
        env={"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert rank.returncode == 0, rank.stderr
    (file,) = (tmp_path / "mlx_ep" / "profiles").glob("none-1-*.json")
    profile = read_profile(file)
    _check(profile)
    assert not profile.links


def test_wrong_usage_is_one_line(tmp_path: Path) -> None:
    (rank,) = run_commands(1, [*COMMAND, "--quick", "--output", str(tmp_path)])
    assert rank.returncode == 2
    assert "--output must be a file" in rank.stderr
    assert len(rank.stderr.strip().splitlines()) == 1


def test_flags_are_checked() -> None:
    assert chosen_packings("affine4, plain", quick=False) == ["affine4", "plain"]
    assert chosen_packings(",".join(PACKINGS), quick=True) == ["affine4"]
    with pytest.raises(ValueError, match="--packings must be some of affine4"):
        chosen_packings("affine4,int3", quick=False)
    assert chosen_widths("1024, 512", quick=False) == (1024, 512)
    for text in ("2048", "2048,700", "0,256", "2048,x"):
        with pytest.raises(ValueError, match="--widths must be two multiples of 256"):
            chosen_widths(text, quick=False)
