"""Which passes ranks share, by what was timed."""

from __future__ import annotations

from mlx_ep.server.sharing import Sharing

TIMED = Sharing(
    on_one={1: (2.0, 1.0), 4: (4.0, 3.7)},
    on_each={1: (1.0, 1.0), 4: (4.0, 2.0)},
)


def test_a_pass_goes_the_way_that_was_clearly_faster() -> None:
    assert TIMED.shares([1, 0])
    assert TIMED.shares([0, 3])
    assert not TIMED.shares([4, 0])  # less than a tenth faster
    assert not TIMED.shares([1, 1])
    assert not TIMED.shares([3, 2])
    assert TIMED.shares([4, 4])
    # Nearly as many on the other rank, and fewer than half.
    assert TIMED.shares([9, 5])
    assert not TIMED.shares([9, 4])


def test_nothing_is_shared_where_nothing_was_timed() -> None:
    assert not Sharing().shares([5, 0])
    assert not Sharing(on_each={4: (2.0, 1.0)}).shares([3, 3])
    assert str(Sharing()) == ""
    assert str(TIMED).startswith(
        "passes go the faster way: 1 token on one rank 2e+03 ms alone, 1e+03 shared; "
        "4 tokens on one rank"
    )
