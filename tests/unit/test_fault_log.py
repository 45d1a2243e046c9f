"""`make fault` keeps what it has found when interrupted, and goes on from there."""

from __future__ import annotations

import sys

import pytest

from tests.support import fault


def outcome(case, codes=(1, 1)):
    report, found = True, ([], [])
    return fault.Outcome(case, 0.5, list(codes), report, *found, "")


@pytest.fixture
def ran(monkeypatch):
    """The combinations that ran; the fourth is interrupted, the second falls short."""
    cases = fault.cases()
    found = []

    def run_case(case):
        if len(found) == 3:
            found.append(None)
            raise KeyboardInterrupt
        found.append(case)
        return outcome(case, (0, 1) if len(found) == 2 else (1, 1))

    monkeypatch.setattr(fault, "run_case", run_case)
    monkeypatch.setattr(fault, "cases", lambda: cases[:6])
    return found


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["fault", *argv])
    with pytest.raises(SystemExit) as end:
        fault.main()
    return end.value.code


def test_it_goes_on_where_it_was_interrupted(ran, tmp_path, monkeypatch, capsys):
    log = ["--log", str(tmp_path / "log")]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *log)
    first = list(ran)
    assert run(monkeypatch, *log, "--resume") is False
    again = ran[len(first) :]
    # What ended well is not run again, what fell short is.
    assert set(again) == set(fault.cases()) - {first[0], first[2]}
    assert "6 combinations, 6 as promised" in capsys.readouterr().out
    assert run(monkeypatch, *log, "--resume") is False
    assert len(ran) == len(first) + len(again)
    # What another commit was found to do says nothing about this one.
    monkeypatch.setattr(fault, "this_commit", lambda: "another")
    assert run(monkeypatch, *log, "--resume") is False
    assert len(ran) == len(first) + len(again) + 6


def test_a_line_that_was_cut_off_is_run_again(ran, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(fault, "cases", lambda: first)
    first = [fault.Case("ring 2", "decode", "SIGKILL", 0)]
    assert run(monkeypatch, "--log", str(log)) is False
    log.write_text(log.read_text()[:-20])
    assert fault.read_log(log, fault.this_commit()) == {}
