"""Every collective of `GroupComm` on real ranks, against its NumPy definition.

Starting ranks takes a second or more, so one run makes many checks; a check that
fails on a rank raises there, with its name in the traceback.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from tests.support.ranks import run_commands, run_ranks

pytestmark = pytest.mark.requires("ranks")

MPI = pytest.mark.requires("mpi")
RUNS = [
    pytest.param("ring", 1, id="one"),
    pytest.param("ring", 2, id="ring-2"),
    pytest.param("ring", 3, id="ring-3"),
    pytest.param("ring", 4, id="ring-4"),
    pytest.param("mpi", 2, id="mpi-2", marks=MPI),
    pytest.param("mpi", 3, id="mpi-3", marks=MPI),
    pytest.param("mpi", 4, id="mpi-4", marks=MPI),
]
NUMBERS = ("uint8", "int32", "float16", "bfloat16", "float32")
BITS = (*NUMBERS, "bool_", "int8", "uint16", "uint32", "int64", "uint64", "complex64")
# 4 ranks on the ring of a 2-core host take 33 ms for a collective: a small set.
FEW = ("uint8", "bfloat16")


def values(shape, dtype, rank):
    """Small whole numbers, different on each rank: sums of them are exact."""
    count = int(np.prod(shape))
    array = (np.arange(count) * 7 + 3 * rank + 1).reshape(shape) % 11
    return array % 2 == 1 if dtype == "bool_" else array.astype(np.float32)


def given(shape, dtype, rank):
    return mx.array(values(shape, dtype, rank)).astype(getattr(mx, dtype))


def assert_same(got, expected, dtype, what):
    assert got.dtype == getattr(mx, dtype), (what, dtype, got.dtype)
    kind = mx.bool_ if dtype == "bool_" else mx.float32
    got = np.array(got.astype(kind))
    np.testing.assert_array_equal(got, expected, err_msg=f"{what} {dtype}", strict=True)


def all_to_all_of(inputs, rank):
    """The definition: chunk `rank` of every rank's input, in rank order."""
    ranks = len(inputs)
    return np.concatenate([np.split(x, ranks)[rank] for x in inputs])


def check_collectives(comm, dtypes, shapes):
    ranks, rank = range(comm.size), comm.rank
    for dtype in dtypes:
        for shape in shapes:
            rows = (comm.size * shape[0], *shape[1:])
            x = given(rows, dtype, rank)
            every = [values(rows, dtype, r) for r in ranks]
            assert_same(comm.all_to_all(x), all_to_all_of(every, rank), dtype, "a2a")
            assert_same(comm.all_gather(x), np.concatenate(every), dtype, "gather")
            if dtype in NUMBERS:
                total = np.sum(every, axis=0, dtype=np.float32)
                assert_same(comm.all_reduce(x), total, dtype, "sum")
                share = np.split(total, comm.size)[rank]
                assert_same(comm.reduce_scatter(x), share, dtype, "scatter")
            for root in {0, comm.size - 1}:
                assert_same(comm.broadcast(x, root), every[root], dtype, "broadcast")


def check_uneven(comm, dtypes, counts, width=3):
    """all_to_all_v for counts[origin][target] rows."""
    rank, ranks = comm.rank, range(comm.size)
    sent, received = counts[rank], [row[rank] for row in counts]
    for dtype in dtypes:
        x = given((sum(sent), width), dtype, rank)
        chunks = [
            np.split(values((sum(counts[r]), width), dtype, r), np.cumsum(counts[r]))
            for r in ranks
        ]
        expected = np.concatenate([chunks[r][rank] for r in ranks])
        assert_same(comm.all_to_all_v(x, sent, received), expected, dtype, "a2a_v")


def count_cases(size):
    random = np.random.default_rng(size)
    none = np.zeros((size, size), dtype=int)
    one_way = none.copy()
    one_way[size - 1, 0] = 5  # one pair of ranks talks, the others have no rows
    return [
        random.integers(0, 6, (size, size)).tolist(),
        none.tolist(),
        one_way.tolist(),
    ]


def check_views(comm):
    """Rows that are not contiguous in memory."""
    rank, ranks = comm.rank, range(comm.size)
    shape = (6, 2 * comm.size)
    x = given(shape, "float32", rank).T[::-1]
    every = [values(shape, "float32", r).T[::-1] for r in ranks]
    assert_same(comm.all_to_all(x), all_to_all_of(every, rank), "float32", "a2a")
    assert_same(comm.all_gather(x), np.concatenate(every), "float32", "gather")
    counts = [2] * comm.size
    result = comm.all_to_all_v(x, counts, counts)
    assert_same(result, all_to_all_of(every, rank), "float32", "a2a_v")


def check_gradients(comm):
    """The gradient goes back where the rows came from."""
    rank, ranks = comm.rank, range(comm.size)
    shape = (2 * comm.size, 3)
    weights = [values(shape, "float32", r + 5) for r in ranks]
    x = given(shape, "float32", rank)

    def loss(x):
        return (comm.all_to_all(x * x) * mx.array(weights[rank])).sum()

    expected = 2 * np.array(x) * all_to_all_of(weights, rank)
    assert_same(mx.grad(loss)(x), expected, "float32", "gradient")

    counts = count_cases(comm.size)[0]
    sent, received = counts[rank], [row[rank] for row in counts]
    x = given((sum(sent), 3), "float32", rank)
    weights = [
        np.split(values((sum(c), 3), "float32", 7), np.cumsum(c)[:-1])
        for c in ([row[r] for row in counts] for r in ranks)
    ]
    own = mx.array(np.concatenate(weights[rank]))

    def uneven_loss(x):
        return (comm.all_to_all_v(x * x, sent, received) * own).sum()

    expected = 2 * np.array(x) * np.concatenate([weights[r][rank] for r in ranks])
    assert_same(mx.grad(uneven_loss)(x), expected, "float32", "gradient_v")


def check_bits(comm):
    """A broadcast and an all-to-all keep -0.0, infinities and the bits of NaN."""
    bits = np.array([0x80000000, 0x7F800000, 0xFFC12345, 1], dtype=np.uint32)
    special = mx.array(bits).view(mx.float32)
    on_root = special if comm.rank == 0 else mx.ones_like(special)
    for dtype, x in ((mx.uint32, on_root), (mx.uint16, on_root.view(mx.bfloat16))):
        got = np.array(comm.broadcast(x).view(dtype))
        np.testing.assert_array_equal(got, np.array(special.view(dtype)))
    x = mx.concatenate([special] * comm.size)
    got = np.array(comm.all_to_all(x).view(mx.uint32))
    np.testing.assert_array_equal(got, np.tile(bits, comm.size))


def check_lazy_order(comm):
    """An all-to-all of what another collective makes, first needed in the middle."""
    x = given((comm.size, 4), "float32", comm.rank)
    total = comm.all_reduce(x)
    result = comm.all_to_all(total) + comm.broadcast(total * comm.rank, comm.size - 1)
    every = sum(values((comm.size, 4), "float32", r) for r in range(comm.size))
    expected = all_to_all_of([every] * comm.size, comm.rank) + every * (comm.size - 1)
    assert_same(result, expected.astype(np.float32), "float32", "order")


def check_objects(comm):
    from mlx_ep.comm import broadcast_object, gather_objects

    own = {"rank": comm.rank, "text": "é" * comm.rank * 9, "list": [1, None, True]}
    every = gather_objects(comm, own)
    assert [item["rank"] for item in every] == list(range(comm.size))
    assert every[comm.rank] == own
    last = comm.size - 1
    assert broadcast_object(comm, own, root=last) == every[last]
    assert broadcast_object(comm, None) is None


def check_errors(comm):
    size = comm.size
    if size > 1:
        text = (
            r"The first dimension \(axis 0\) must be divisible by the group size: got "
            f"{size + 1} rows and {size} ranks"
        )
        with pytest.raises(ValueError, match=text):
            comm.all_to_all(mx.zeros((size + 1, 2)))
        with pytest.raises(ValueError, match=text):
            comm.reduce_scatter(mx.zeros((size + 1, 2)))
    x = mx.zeros((size, 2))
    with pytest.raises(ValueError, match="dtype bool"):
        comm.all_reduce(mx.array([True]))
    with pytest.raises(ValueError, match=f"0 to {size - 1}, got {size}"):
        comm.broadcast(x, root=size)
    ones = [1] * size
    with pytest.raises(ValueError, match="send_counts must add up to the"):
        comm.all_to_all_v(x, [2] * size, [2] * size)
    with pytest.raises(ValueError, match=f"recv_counts must hold {size} numbers"):
        comm.all_to_all_v(x, ones, [*ones, 1])
    with pytest.raises(ValueError, match="send_counts must hold"):
        comm.all_to_all_v(x, [-1] * size, ones)
    with pytest.raises(ValueError, match="sends itself what it receives"):
        comm.all_to_all_v(x, ones, [2] * size)


def check_capability(comm):
    """The table says what raises here, and where send reaches nobody."""
    x = mx.ones((comm.size, 2))
    attempts = {
        "sum_scatter": lambda: mx.distributed.sum_scatter(x, group=comm.group),
        "split": lambda: comm.group.split(0),
    }
    for operation, attempt in attempts.items():
        if comm.size > 1 and operation not in comm.capability.operations:
            with pytest.raises(RuntimeError, match="not"):
                mx.eval(attempt())
        elif comm.size > 1:
            attempt()
    if comm.capability.peers == "neighbours" and comm.size > 3:
        with pytest.raises(RuntimeError):
            peer = (comm.rank + 2) % comm.size
            mx.eval(mx.distributed.send(x, peer, group=comm.group))


def check_everything(group, transport, small):
    from mlx_ep.comm import Comm, GroupComm, choose_schedule

    comm = GroupComm(group)
    assert isinstance(comm, Comm)
    assert (comm.rank, comm.size) == (group.rank(), group.size())
    assert comm.transport == (transport if comm.size > 1 else "none")
    assert comm.schedule == choose_schedule(comm.capability, comm.size)
    check_capability(comm)
    check_errors(comm)
    shapes = [(2, 3)] if small else [(2, 3), (1,), (0, 4), (3, 2, 2)]
    check_collectives(comm, FEW if small else BITS, shapes)
    if small:
        check_collectives(comm, ["float32"], [(0, 4)])
    for counts in count_cases(comm.size)[: 1 if small else None]:
        check_uneven(comm, FEW if small else BITS, counts)
    check_views(comm)
    check_gradients(comm)
    check_bits(comm)
    check_lazy_order(comm)
    check_objects(comm)
    comm.barrier()
    return comm.schedule.kind


def check_fixed_shapes(group):
    """The all-to-all that JACCL would do, over the transport at hand."""
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group, transport="jaccl")
    for counts in count_cases(comm.size):
        check_uneven(comm, ("int32", "bfloat16"), counts)
    check_views(comm)
    check_gradients(comm)
    check_bits(comm)
    check_lazy_order(comm)
    return comm.schedule.kind


def check_relay(group):
    """The ring's relay over MPI, which is quick with more ranks than cores."""
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group, transport="ring")
    check_collectives(comm, FEW, [(2, 3), (0, 4)])
    for counts in count_cases(comm.size):
        check_uneven(comm, FEW, counts)
    check_gradients(comm)
    return comm.schedule.kind


def refuse_schedules(group):
    from mlx_ep.comm import GroupComm
    from mlx_ep.comm.schedules import gather_schedule

    with pytest.raises(ValueError, match="for the 1 ranks of the group, got one for 3"):
        GroupComm(group, schedule=gather_schedule(3))


@pytest.mark.parametrize(("transport", "num_ranks"), RUNS)
def test_collectives(transport, num_ranks):
    small = transport == "ring" and num_ranks > 2
    results = run_ranks(
        num_ranks, check_everything, transport, small, transport=transport
    )
    kinds = {1: "gather", 2: "exchange"}
    most = "relay" if transport == "ring" else "pairwise"
    assert results == [kinds.get(num_ranks, most)] * num_ranks


@pytest.mark.requires("mpi")
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_fixed_shapes(num_ranks):
    results = run_ranks(num_ranks, check_fixed_shapes, transport="mpi")
    assert results == ["gather"] * num_ranks


@pytest.mark.requires("mpi")
@pytest.mark.parametrize("num_ranks", [4, 5])
def test_relay(num_ranks):
    results = run_ranks(num_ranks, check_relay, transport="mpi")
    assert results == ["relay"] * num_ranks


def test_schedules_that_do_not_fit_are_refused():
    run_ranks(1, refuse_schedules)


LEFT_ALONE = """
import os, time
import mlx.core as mx
from mlx_ep.comm import GroupComm
from mlx_ep.types import to_host
comm = GroupComm(mx.distributed.init(strict=True, backend="ring"))
comm.barrier()
if comm.rank == 1:
    os._exit(0)
time.sleep(0.5)
try:
    print("got", to_host(comm.all_gather(mx.ones(4))))
except RuntimeError as error:
    print("raised", error)
os._exit(0)
"""


def test_a_peer_that_left_is_an_error_and_not_a_value():
    outcomes = run_commands(2, [sys.executable, "-c", LEFT_ALONE])
    assert outcomes[0].stdout.startswith("raised"), outcomes[0]
