"""The command mlx_ep.plan, run in this process."""

from __future__ import annotations

import pytest

from mlx_ep.plan import __main__ as command
from mlx_ep.plan import build


def run_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, str]:
    """The exit code of the command, and what it printed."""
    monkeypatch.setattr("sys.argv", ["mlx_ep.plan", *flags])
    monkeypatch.setattr(build, "calibrated_profile", lambda num_ranks: None)
    code = 0
    try:
        command.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err
