"""Tests of the schedules of an all-to-all, with a simulator of blocking ranks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ep.comm.capabilities import CAPABILITIES
from mlx_ep.comm.schedules import (
    choose_schedule,
    exchange_schedule,
    gather_schedule,
    pairwise_schedule,
    relay_schedule,
)

RANKS = range(1, 9)
MAKERS = [gather_schedule, pairwise_schedule, relay_schedule]
SCHEDULES = [exchange_schedule(2)] + [maker(p) for maker in MAKERS for p in RANKS]


def schedule_id(schedule):
    return f"{schedule.kind}-{schedule.num_ranks}"


def simulate(schedule):
    """Run a schedule with sends and receives that block until they meet.

    Returns what every rank holds in the end, how often each chunk arrived where, and
    fails where ranks wait for each other for ever.
    """
    ranks = range(schedule.num_ranks)
    queues = [list(schedule.messages(rank)) for rank in ranks]
    held = [{(rank, target) for target in ranks} for rank in ranks]
    arrivals = Counter()
    while any(queues):
        met = [
            (rank, queues[rank][0].peer)
            for rank in ranks
            if queues[rank]
            and queues[rank][0].is_send
            and queues[queues[rank][0].peer]
            and not queues[queues[rank][0].peer][0].is_send
            and queues[queues[rank][0].peer][0].peer == rank
        ]
        assert met, f"deadlock: {[queue[:1] for queue in queues]}"
        for source, destination in met:
            sent, received = queues[source].pop(0), queues[destination].pop(0)
            assert sent.chunks == received.chunks, "the two sides expect other chunks"
            assert held[source].issuperset(sent.chunks), "a chunk it does not have"
            held[destination].update(received.chunks)
            arrivals.update((destination, chunk) for chunk in received.chunks)
    return held, arrivals


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_id)
def test_every_chunk_arrives_once_and_nobody_waits_for_ever(schedule):
    held, arrivals = simulate(schedule)
    ranks = range(schedule.num_ranks)
    for target in ranks:
        for origin in ranks:
            assert (origin, target) in held[target]
            expected = 0 if origin == target else 1
            if schedule.kind != "gather":  # which brings one's own back to nobody
                assert arrivals[target, (origin, target)] == expected
    assert max(arrivals.values(), default=1) == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=schedule_id)
def test_a_round_has_one_message_each_way(schedule):
    for step in schedule.rounds:
        links = {(t.source, t.destination) for t in step.transfers}
        assert all(source != destination for source, destination in links)
        assert max(Counter(source for source, _ in links).values()) == 1
        assert max(Counter(destination for _, destination in links).values()) == 1


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_relay_uses_neighbours_only(num_ranks):
    for step in relay_schedule(num_ranks).rounds:
        for t in step.transfers:
            assert (t.source - t.destination) % num_ranks in (1, num_ranks - 1)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_pairs_are_sent_directly(num_ranks):
    transfers = [t for r in pairwise_schedule(num_ranks).rounds for t in r.transfers]
    assert all((t.source, t.destination) == (t.origin, t.target) for t in transfers)
    assert len(pairwise_schedule(num_ranks).rounds) == (
        num_ranks - 1 if num_ranks % 2 == 0 or num_ranks == 1 else num_ranks
    )


def test_a_relay_of_four_ranks_by_hand():
    # Upwards: every rank to the next one, even ranks also to the opposite one.
    # Downwards: every rank to the one before, odd ranks also to the opposite one.
    schedule = relay_schedule(4)
    assert [
        " ".join(
            f"{t.source}>{t.destination}:{t.origin}{t.target}" for t in r.transfers
        )
        for r in schedule.rounds
    ] == [
        "0>1:01 0>1:02 1>2:12 2>3:23 2>3:20 3>0:30",
        "0>3:03 1>0:10 1>0:13 2>1:21 3>2:32 3>2:31",
        "1>2:02 3>0:20",
        "0>3:13 2>1:31",
    ]
    messages = [(m.is_send, m.peer, m.chunks) for m in schedule.messages(1)]
    assert messages == [
        (False, 0, ((0, 1), (0, 2))),
        (True, 2, ((1, 2),)),
        (False, 2, ((2, 1),)),
        (True, 0, ((1, 0), (1, 3))),
        (True, 2, ((0, 2),)),
        (False, 2, ((3, 1),)),
    ]


def bytes_sent(schedule, chunk_bytes):
    """Bytes each rank sends, passed-on chunks included."""
    totals = [0] * schedule.num_ranks
    for (source, _), count in schedule._loads(chunk_bytes).items():
        totals[source] += count
    return totals


def test_bytes_of_a_uniform_all_to_all():
    # Pairwise: one chunk to each other rank, one on each link.
    assert bytes_sent(pairwise_schedule(5), 10) == [40] * 5
    assert pairwise_schedule(5).busiest_link_bytes(10) == 10
    # Gather: all 4 chunks of 3 ranks pass every link of the ring.
    assert bytes_sent(gather_schedule(4), 10) == [120] * 4
    assert gather_schedule(4).busiest_link_bytes(10) == 120
    # Relay of 4: 12 chunks, 4 of them over two hops, on 8 links.
    assert bytes_sent(relay_schedule(4), 10) == [40] * 4
    assert relay_schedule(4).busiest_link_bytes(10) == 20
    assert bytes_sent(exchange_schedule(2), 10) == [10, 10]
    assert bytes_sent(gather_schedule(1), 10) == [0]
    assert gather_schedule(1).busiest_link_bytes(10) == 0


@settings(deadline=None)
@given(data=st.data(), num_ranks=st.integers(1, 8))
def test_bytes_of_a_pairwise_all_to_all_are_those_of_its_chunks(data, num_ranks):
    row = st.lists(st.integers(0, 99), min_size=num_ranks, max_size=num_ranks)
    sizes = data.draw(st.lists(row, min_size=num_ranks, max_size=num_ranks))
    expected = [sum(sizes[rank]) - sizes[rank][rank] for rank in range(num_ranks)]
    assert bytes_sent(pairwise_schedule(num_ranks), sizes) == expected
    # Every hop repeats the chunk, so a relay never sends less.
    assert sum(bytes_sent(relay_schedule(num_ranks), sizes)) >= sum(expected)


@settings(deadline=None)
@given(num_ranks=st.integers(3, 16))
def test_relays_are_busy_both_ways_alike(num_ranks):
    # The sum of the distances to all other ranks, shared by two directions.
    hops = sum(min(d, num_ranks - d) for d in range(1, num_ranks))
    schedule = relay_schedule(num_ranks)
    assert sum(bytes_sent(schedule, 1)) == num_ranks * hops
    assert schedule.busiest_link_bytes(1) <= hops / 2 + 1


@pytest.mark.parametrize(
    ("transport", "kinds"),
    [
        ("none", {1: "gather"}),
        ("ring", {1: "gather", 2: "exchange", 3: "relay", 4: "relay", 8: "relay"}),
        ("mpi", {1: "gather", 2: "exchange", 3: "pairwise", 8: "pairwise"}),
        ("jaccl", {1: "gather", 2: "exchange", 3: "gather", 8: "gather"}),
        ("jaccl-ring", {1: "gather", 2: "exchange", 3: "gather", 8: "gather"}),
    ],
)
def test_the_choice_for_each_transport(transport, kinds):
    for num_ranks, kind in kinds.items():
        schedule = choose_schedule(CAPABILITIES[transport], num_ranks)
        assert (schedule.kind, schedule.num_ranks) == (kind, num_ranks)


@pytest.mark.parametrize(("transport", "num_ranks"), [("jaccl", 9), ("none", 2)])
def test_too_many_ranks_are_refused(transport, num_ranks):
    with pytest.raises(ValueError, match=f"got {num_ranks}"):
        choose_schedule(CAPABILITIES[transport], num_ranks)
    with pytest.raises(ValueError, match="got 0"):
        choose_schedule(CAPABILITIES[transport], 0)


def test_an_exchange_is_for_two():
    with pytest.raises(ValueError, match="needs 2 ranks, got 3"):
        exchange_schedule(3)


def test_the_table_names_operations_of_mlx():
    import mlx.core as mx

    for name, capability in CAPABILITIES.items():
        assert name == capability.transport
        # Fixed-shape transports never use their sends, all others need them.
        assert (capability.peers == "none") == ("send" not in capability.operations)
        for operation in capability.operations - {"split"}:
            assert hasattr(mx.distributed, operation)
