"""What tests share through pytest: the tiers a test can require.

Mark a test (or a module, with `pytestmark`) with `pytest.mark.requires("ranks")`.
Where the tier is missing the test is skipped, or fails if MLX_EP_REQUIRE names it.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import shape_checks
from tests.support.fork_server import FOLDER
from tests.support.private import user_folder
from tests.support.tiers import require

shape_checks.make_cheaper()  # before a test imports this package


gc.disable()  # until all tests are imported: nothing of that is garbage


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()  # a collection in a test does not go through all that is imported
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        # Here all workers find the processes from which ranks are forked.
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="forks-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[FOLDER]))
    # What warm-up measures is kept for later runs of the tests, not of the user.
    os.environ["XDG_CACHE_HOME"] = str(user_folder("mlx-ep-tests"))
    config.addinivalue_line(
        "markers",
        'requires(tier): needs a tier: "ranks", "mpi" or "host_metal"; skipped where '
        "it is missing, failed where MLX_EP_REQUIRE names it",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        for tier in mark.args:
            require(tier)


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """A command that a test runs here logs to that test's standard error only."""
    logger = logging.getLogger("mlx_ep")
    handlers, level, goes_on = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, goes_on
    logger.setLevel(level)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What warm-up measures is kept for this test only, and nothing is forced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLX_EP_BACKEND", raising=False)
