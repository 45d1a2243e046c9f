"""Fixtures: kernels run on the GPU where there is one, else on the CPU with checks."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import mlx.core as mx
import pytest

from mlx_ep.kernels import metal, ops
from tests.support import host
from tests.support.host_kernels import installed


@pytest.fixture(params=[0, 1, 7], ids=lambda seed: f"schedule{seed}")
def schedule(request: pytest.FixtureRequest) -> int:
    """Order in which threads and groups run on the CPU: up, down, shuffled."""
    return request.param


@pytest.fixture
def host_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[host.Launch]]:
    """Kernels execute on the CPU; the list holds what each launch did."""
    yield from installed(monkeypatch)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels execute on the GPU where there is one, else on the CPU."""
    if mx.metal.is_available():
        yield
        return
    for _ in installed(monkeypatch):
        yield


@pytest.fixture(params=["ops", "metal"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """The twins, and the kernels as with `kernels`."""
    if request.param == "ops":
        return ops
    request.getfixturevalue("kernels")
    return metal


@pytest.fixture
def scheduled_kernels(monkeypatch: pytest.MonkeyPatch, schedule: int) -> Iterator[None]:
    """As `kernels`, with the threads in several orders where the CPU runs them."""
    if mx.metal.is_available():
        yield
        return
    for _ in installed(monkeypatch, schedule):
        yield
