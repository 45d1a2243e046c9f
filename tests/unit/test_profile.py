"""Profiles: JSON there and back, errors that name the field, overrides, the shipped."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest

from mlx_ep.cost.profile import (
    MEASURED_ONLY,
    Profile,
    find_profile,
    from_json,
    overridden,
    parse_settings,
    read_profile,
    shipped_profiles,
    slowest,
    to_json,
    write_profile,
)
from mlx_ep.cost.records import CollectiveTable, Link, MatrixCost

LINK = Link(
    transport="mpi",
    latency=1e-5,
    bandwidth=1e9,
    tables={
        "all_reduce": CollectiveTable(
            ranks=2.0, bytes=(256.0, 65536.0), seconds=(1e-5, 2e-5)
        )
    },
)
PROFILE = Profile(
    name="two ranks",
    note="for a test",
    memory_bandwidth=1e10,
    copy_bandwidth=1e9,
    matmul_rate=2e9,
    expert_rate=3e9,
    unsorted_rate=1e9,
    attention_rate=1e9,
    block_seconds=1e-4,
    layer_seconds=2e-4,
    step_seconds=0.0,
    element_seconds=1e-9,
    route_seconds=1e-9,
    sync_seconds=1e-5,
    memory_bytes=1e9,
    links={"mpi": LINK},
    experts={"blas|float32": MatrixCost(rows=(1.0, 4.0), seconds=(1e-9, 2e-9))},
    dense={"float32": MatrixCost(rows=(1.0,), seconds=(1e-9,))},
    sources={"memory_bandwidth": "a page", "links.mpi.latency": "another"},
)


def test_json_there_and_back(tmp_path) -> None:
    file = tmp_path / "folder" / "profile.json"
    write_profile(PROFILE, file)
    again = read_profile(file)
    assert again == PROFILE
    assert again.source("links.mpi.latency") == "another"
    assert again.source("experts.blas|float32.seconds") == "not said"
    content = json.loads(file.read_text())
    assert content["version"] == 1
    assert content["memory_bandwidth"] == {
        "value": 1e10, "unit": "B/s", "source": "a page",
    }  # fmt: skip


def _without(content, *path):
    *parents, last = path
    for name in parents:
        content = content[name]
    del content[last]


def _with(content, value, *path):
    *parents, last = path
    for name in parents:
        content = content[name]
    content[last] = value


BROKEN = [
    (lambda c: _without(c, "version"), "with a version"),
    (lambda c: _with(c, 2, "version"), "version must be 1; got 2"),
    (lambda c: _with(c, "guessed", "kind"), "kind must be published or measured"),
    (lambda c: _without(c, "block_seconds"), "must hold block_seconds"),
    (lambda c: _without(c, "links", "mpi", "latency"), "must hold links.mpi.latency"),
    (lambda c: _with(c, 1, "speed"), "A profile has no speed"),
    (lambda c: _with(c, 1, "links", "mpi", "speed"), "no links.mpi.speed"),
    (lambda c: _with(c, 5, "matmul_rate"), "matmul_rate must be an object with value"),
    (
        lambda c: _with(c, "GB/s", "memory_bandwidth", "unit"),
        "memory_bandwidth must be in B/s; got 'GB/s'",
    ),
    (
        lambda c: _with(c, 0, "memory_bandwidth", "value"),
        "memory_bandwidth must be above 0",
    ),
    (
        lambda c: _with(c, -1.0, "sync_seconds", "value"),
        "sync_seconds must be finite and not negative",
    ),
    (
        lambda c: _with(c, math.nan, "sync_seconds", "value"),
        "sync_seconds must be finite",
    ),
    (lambda c: _with(c, "1", "sync_seconds", "value"), "sync_seconds must be finite"),
    (lambda c: _with(c, [1.0], "sync_seconds", "value"), "must be a number"),
    (
        lambda c: _with(c, 1.0, "experts", "blas|float32", "rows", "value"),
        "blas|float32.rows must be a list",
    ),
    (
        lambda c: _with(c, [4, 1], "experts", "blas|float32", "rows", "value"),
        "experts.blas|float32: rows must ascend",
    ),
    (lambda c: _with(c, "cable", "links", "mpi", "transport"), "transport must be one"),
    (lambda c: _with(c, "star", "links", "mpi", "topology"), "must be mesh or ring"),
    (lambda c: _with(c, [], "links"), "links must be an object"),
    (lambda c: _with(c, 3, "name"), "name must be a text"),
]


@pytest.mark.parametrize("spoil, message", BROKEN)
def test_errors_say_which_field(spoil, message) -> None:
    content = json.loads(json.dumps(to_json(PROFILE)))
    spoil(content)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        from_json(content)


def test_files_that_are_no_profile(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"version": 1')
    with pytest.raises(ValueError, match=r"half\.json is not one"):
        read_profile(tmp_path / "half.json")
    with pytest.raises(ValueError, match="a file, or one of m1-ultra"):
        find_profile("m9-ultra")
    file = tmp_path / "mine.json"
    write_profile(PROFILE, file)
    assert find_profile(str(file)) == PROFILE


def test_every_number_can_be_overridden() -> None:
    settings = parse_settings(
        [
            "memory_bandwidth=7e11",
            "links.mpi.latency=3e-5",
            "experts.blas|float32.seconds=1e-9,5e-9",
        ]
    )
    found = overridden(PROFILE, settings)
    assert found.memory_bandwidth == 7e11
    assert found.links["mpi"].latency == 3e-5
    assert found.experts["blas|float32"].seconds == (1e-9, 5e-9)
    assert found.source("memory_bandwidth") == "set by the user"
    assert (
        replace(
            found,
            memory_bandwidth=PROFILE.memory_bandwidth,
            links=PROFILE.links,
            experts=PROFILE.experts,
        )
        == PROFILE
    )
    nested = overridden(PROFILE, {"links": {"mpi": {"latency": 3e-5}}})
    assert nested.links["mpi"].latency == 3e-5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"speed": 1.0}, "has no number 'speed'; under it there are"),
        ({"links.jaccl.latency": 1.0}, "under links there are mpi"),
        ({"links": 1.0}, "'links' is not a number"),
        ({"memory_bandwidth.value": 1.0}, "has no number"),
        ({"memory_bandwidth": -1.0}, "memory_bandwidth must be finite"),
    ],
)
def test_wrong_overrides(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        overridden(PROFILE, settings)


@pytest.mark.parametrize("text", ["memory_bandwidth", "=5", "latency=fast", "latency="])
def test_wrong_settings(text) -> None:
    with pytest.raises(ValueError, match="must be NAME=NUMBER"):
        parse_settings([text])


def test_slowest_of_two_ranks() -> None:
    other = replace(
        PROFILE,
        memory_bandwidth=5e9,
        block_seconds=5e-4,
        matmul_rate=9e9,
        memory_bytes=5e8,
        experts={
            "blas|float32": MatrixCost(rows=(1.0, 4.0, 8.0), seconds=(3e-9,) * 3),
            "gather|float32": MatrixCost(rows=(1.0,), seconds=(1e-9,)),
        },
    )
    found = slowest([PROFILE, other])
    assert (found.memory_bandwidth, found.memory_bytes) == (5e9, 5e8)
    assert (found.matmul_rate, found.block_seconds) == (2e9, 5e-4)
    # What all ranks have: the rows that both measured, the longer time of each.
    assert list(found.experts) == ["blas|float32"]
    assert found.experts["blas|float32"].rows == (1.0, 4.0)
    assert found.experts["blas|float32"].seconds == (3e-9, 3e-9)
    assert slowest([PROFILE]) == PROFILE


def test_slowest_link_is_one_that_all_have() -> None:
    both = slowest([find_profile("m4-pro"), find_profile("m1-ultra")])
    assert list(both.links) == ["ring"]
    assert both.link().bandwidth == find_profile("m1-ultra").link().bandwidth
    assert both.name == "M4 Pro, 20-core GPU, M1 Ultra, 64-core GPU"
    table = LINK.tables["all_reduce"]
    late = replace(table, seconds=(2e-5, 1.5e-5))
    other = replace(LINK, latency=5e-6, bandwidth=5e8, tables={"all_reduce": late})
    found = slowest([PROFILE, replace(PROFILE, links={"mpi": other})]).link("mpi")
    assert (found.latency, found.bandwidth) == (1e-5, 5e8)
    assert found.tables["all_reduce"].seconds == (2e-5, 2e-5)
    short = replace(table, bytes=(256.0, 512.0))
    other = replace(LINK, tables={"all_reduce": short})
    found = slowest([PROFILE, replace(PROFILE, links={"mpi": other})]).link("mpi")
    assert not found.tables


CHIPS = ["m1-ultra", "m2-ultra", "m3-ultra", "m4-max", "m4-pro", "m5-max"]


def test_shipped_profiles_are_there() -> None:
    assert shipped_profiles() == CHIPS


@pytest.mark.parametrize("name", CHIPS)
def test_shipped_profiles_say_where_each_number_is_from(name) -> None:
    profile = find_profile(name)
    assert profile.kind == "published"
    assert "published figures" in profile.note
    numbers = [f.name for f in fields(Profile) if "unit" in f.metadata]
    # Nobody published what a loop over batches adds: not there, and said so.
    for number in MEASURED_ONLY:
        numbers.remove(number)
        assert number not in profile.sources and getattr(profile, number) == 0.0
    for link, content in profile.links.items():
        assert content.transport == link
        numbers += [
            f"links.{link}.{f.name}" for f in fields(Link) if "unit" in f.metadata
        ]
    for path in numbers:
        source = profile.source(path)
        assert "https://" in source or "assumed" in source or "Apple" in source, path
    # JACCL needs Thunderbolt 5.
    assert ("jaccl" in profile.links) == (name not in ("m1-ultra", "m2-ultra"))
    assert "ring" in profile.links
