"""Flags that mlx-lm's commands have too: same default, or a written reason."""

from __future__ import annotations

import pytest

from tools.flags_table import COMMANDS, PAGE, REASONS, Row, page, rows


@pytest.fixture(scope="module")
def table() -> dict[str, list[Row]]:
    return {command: rows(command) for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_flag_of_mlx_lm_is_the_same_or_has_a_reason(command, table) -> None:
    found = table[command]
    assert len(found) >= 7
    for row in found:
        assert row.is_same or row.reason, row


def test_each_reason_is_of_a_flag(table) -> None:
    names = {(command, row.theirs.name) for command in table for row in table[command]}
    anywhere = {name for _, name in names}
    for command, name in REASONS:
        assert (command, name) in names or (command == "*" and name in anywhere)


def test_the_page_is_what_is_there() -> None:
    """After a change: python -m tools.flags_table --write"""
    assert PAGE.read_text() == page()
