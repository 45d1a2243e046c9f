"""Many wrong command lines of a command in one process per rank.

Starting Python and joining the ranks takes longer than saying what is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from tests.support.ranks import run_commands

_PROGRAM = """
import contextlib, io, json, sys, traceback
from importlib import import_module
command, module = sys.argv[1:3]
main = import_module(module).main
if sys.argv[4:] == ["no weights"]:
    from mlx_ep.api import PreparedModel
    def refuse(prepared):
        raise AssertionError("weights are read")
    PreparedModel.load = refuse
outcomes = []
for argv in json.loads(sys.argv[3]):
    sys.argv = [command, *argv]
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            main()
        except SystemExit as error:
            code = error.code
        except BaseException:  # what a user would see as a traceback
            traceback.print_exc()
            code = 1
    outcomes.append([code, errors.getvalue()])
print(json.dumps(outcomes))
"""


def outcomes_of(
    num_ranks: int,
    command_lines: Sequence[Sequence[str]],
    command: str = "mlx_ep.generate",
    module: str | None = None,
    env: dict[str, str] | None = None,
    reads: bool = True,
) -> list[list[tuple[int, str]]]:
    """Per command line and rank: the exit code and what was printed.

    Args:
        module: where its `main` is; None: a module of the command's name.
        env: further variables of the ranks.
        reads: whether weights may be read.
    """
    lines = json.dumps(list(map(list, command_lines)))
    argv = [sys.executable, "-c", _PROGRAM, command, module or command, lines]
    argv += [] if reads else ["no weights"]
    ranks = []
    for outcome in run_commands(num_ranks, argv, env=env):
        assert outcome.returncode == 0, outcome.stderr
        ranks.append(json.loads(outcome.stdout.splitlines()[-1]))
    return [[tuple(rank[i]) for rank in ranks] for i in range(len(command_lines))]


def assert_usage_errors(
    num_ranks: int, cases: Sequence[tuple[Sequence[str], str]]
) -> None:
    """Exit code 2 on every rank, and one line, by rank 0, that says the text."""
    found = outcomes_of(num_ranks, [options for options, _ in cases])
    for (options, text), ranks in zip(cases, found, strict=True):
        assert [code for code, _ in ranks] == [2] * num_ranks, (options, ranks)
        assert text in ranks[0][1], (options, ranks[0][1])
        assert ranks[0][1].startswith("mlx_ep.generate: error: "), (options, ranks)
        assert len(ranks[0][1].splitlines()) == 1
        assert all(printed == "" for _, printed in ranks[1:])
