"""One rank's problem is everybody's error."""

from __future__ import annotations

from mlx_ep.comm import GroupComm, agreed, shortened
from mlx_ep.comm.objects import MOST_CHARACTERS
from tests.support.ranks import run_ranks


def outcomes(group):
    """What each way to have a problem comes to on this rank, then a value."""
    comm = GroupComm(group)

    def try_it(problem_of):
        def compute():
            if problem := problem_of(comm.rank):
                raise ValueError(problem)
            return comm.rank * 10

        try:
            return agreed(comm, compute)
        except ValueError as error:
            return str(error)

    return [
        try_it(lambda rank: "no file" if rank == 1 else ""),
        try_it(lambda rank: "no file"),
        try_it(lambda rank: "x" * 100_000 if rank == 0 else ""),
        try_it(lambda rank: ""),
    ]


def test_agreed():
    ranks = run_ranks(3, outcomes)
    for rank, (one, everyone, long, value) in enumerate(ranks):
        assert one == "rank 1: no file"
        assert everyone == "no file"
        assert long.startswith("rank 0: xxx")
        assert len(long) <= MOST_CHARACTERS + 10
        assert value == rank * 10


def test_shortened():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdefghijklmnop", 9) == "ab ... op"
