"""What builds the kernels where a machine has no compiler, and what happens without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import compilers
from tests.support.tiers import require


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSLHOST_CXX", raising=False)
    monkeypatch.setattr(compilers, "builder", compilers.builder.__wrapped__)


def test_without_any_compiler_the_tier_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(compilers, "zig", lambda: None)
    monkeypatch.setenv("MLX_EP_REQUIRE", "ranks,host_metal")
    with pytest.raises(pytest.fail.Exception, match="pip install ziglang"):
        require("host_metal")
    monkeypatch.delenv("MLX_EP_REQUIRE")
    with pytest.raises(pytest.skip.Exception, match="pip install ziglang"):
        require("host_metal")


def test_without_a_system_compiler_zig_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    command = compilers.builder()
    assert command is not None and command[1] == "c++"
    assert Path(command[0]).name == "zig" and compilers.is_clang(command)


@pytest.mark.slow
@pytest.mark.requires("host_metal")
def test_all_bugs_are_caught_in_what_zig_builds() -> None:
    """The first time it builds its C++ library, which takes about a minute."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/metal/test_host.py", "tests/metal/test_kernel_mutations.py"]
    environment = os.environ | {"MSLHOST_CXX": "zig"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout and "passed" in run.stdout
