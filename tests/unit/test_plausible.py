"""Numbers that calibration should not have found, and those that it may."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_ep.cost.plausible import implausible
from mlx_ep.cost.profile import Profile, find_profile, shipped_profiles
from mlx_ep.cost.profile_store import find_calibrated, store_profile
from mlx_ep.cost.records import CollectiveTable, MatrixCost
from tests.support.round_numbers import JACCL, PROFILE


def test_every_shipped_profile_is_plausible() -> None:
    for name in shipped_profiles():
        assert implausible(find_profile(name)) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"memory_bandwidth": 1e3}, "memory_bandwidth = 1e+03: must be from 2e+08 to"),
        ({"layer_seconds": 0.0}, "layer_seconds = 0: must be from 1e-06 to 0.1 (the"),
        ({"sync_seconds": 1.0}, "sync_seconds = 1: must be from 1e-07 to 0.05"),
        ({"expert_rate": 2e9, "matmul_rate": 1e9, "unsorted_rate": 2e15},
         "unsorted_rate = 2e+15: must be at most 8e+09, 4 times the best rate"),
        ({"links": {"jaccl": replace(JACCL, latency=1e-9)}},
         "links.jaccl.latency = 1e-09: must be from 2e-07 to 0.1 (shared memory"),
        ({"links": {"jaccl": replace(JACCL, tables={"all_to_all": CollectiveTable(
            ranks=2.0, bytes=(256, 65536), seconds=(1.2e-3, 2e-4))})}},
         "links.jaccl.all_to_all: 65536 bytes take 0.0002 s, 256 take 0.0012 s: must"),
        ({"experts": {"gather|affine": MatrixCost(rows=(1, 2), seconds=(0.0, 1e-9))}},
         "experts.gather|affine: 1 rows take 0 s a weight: must be above 0"),
        ({"dense": {"plain": MatrixCost(rows=(1, 2, 4), seconds=(3e-9, 1e-9, 4e-9))}},
         "dense.plain: 2 rows take 1e-09 s, 1 take 3e-09 s: must be at least 0.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_with_its_bound(change, words) -> None:
    plausible = replace(PROFILE, layer_seconds=1e-4, step_seconds=1e-4)
    plausible = replace(plausible, sync_seconds=1e-5)
    (line,) = implausible(replace(plausible, **change))
    assert line.startswith(words)


def test_quick_profiles_lie_where_nothing_looks(tmp_path) -> None:
    chips = ["Apple M3 Ultra", "Apple M2"]
    file = store_profile(PROFILE, tmp_path, "ring", chips, quick=True)
    assert file.exists()
    assert find_calibrated(tmp_path, 2) is None
    assert find_calibrated(tmp_path, 2, "ring", chips) is None
    store_profile(PROFILE, tmp_path, "ring", chips)
    found = find_calibrated(tmp_path, 2, "ring", chips[::-1])
    assert isinstance(found, Profile) and found.name == PROFILE.name
