"""Kernels in a test that has no GPU: the CPU executes them, with checks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlx_ep.kernels import loader
from tests.support import host
from tests.support.tiers import require


def installed(
    monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> Iterator[list[host.Launch]]:
    """Kernels execute on the CPU until resumed; every launch must be spotless."""
    require("host_metal")
    loader.forget_kernels()
    launches = host.install(monkeypatch, seed=seed)
    yield launches
    loader.forget_kernels()
    for launch in launches:
        assert not launch.warnings, launch.warnings
        assert "divergent_simd_operations" not in launch.statistics, launch.name
