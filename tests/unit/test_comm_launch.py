"""Tests of joining the other ranks: what the environment says, checked."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import pytest

from mlx_ep.comm import init, transport_of_environment
from mlx_ep.comm.launch import Launched, check_environment
from tests.support.ranks import run_commands, run_ranks

TWO = [["127.0.0.1:5001"], ["127.0.0.1:5002"]]
LAUNCHER = ("MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "PMIX_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHER, "OMPI_COMM_WORLD_SIZE", "MLX_METAL_FAST_SYNCH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ring(tmp_path):
    """An environment of the ring, as `mlx.launch` sets it."""

    def make(hosts=TWO, rank="0"):
        path = tmp_path / "hosts.json"
        path.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
        return {"MLX_HOSTFILE": str(path), "MLX_RANK": rank}

    return make


@pytest.fixture
def jaccl(tmp_path):
    def make(num_ranks, **more):
        path = tmp_path / "devices.json"
        rows = [
            [None if i == j else f"rdma_en{j}" for j in range(num_ranks)]
            for i in range(num_ranks)
        ]
        path.write_text(json.dumps(rows))
        return {
            "MLX_IBV_DEVICES": str(path),
            "MLX_RANK": "1",
            "MLX_JACCL_COORDINATOR": "10.0.0.1:32323",
        } | more

    return make


@pytest.mark.parametrize(
    ("environ", "transport"),
    [
        ({}, "none"),
        ({"MLX_RANK": "0"}, "none"),
        ({"MLX_HOSTFILE": "f", "MLX_RANK": "0"}, "ring"),
        ({"MLX_HOSTFILE": "f", "MLX_RANK": "0", "PMIX_RANK": "0"}, "ring"),
        ({"MLX_IBV_DEVICES": "f", "MLX_RANK": "0"}, "jaccl"),
        ({"MLX_IBV_DEVICES": "f", "MLX_JACCL_RING": "1"}, "jaccl-ring"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),
        ({"PMIX_RANK": "0"}, "mpi"),
    ],
)
def test_the_transport_is_what_the_launcher_prepared(environ, transport):
    assert transport_of_environment(environ) == transport


def test_what_each_launcher_says(ring, jaccl):
    assert check_environment({}) == Launched("none", 0, 1)
    assert check_environment({}, "any", 1) == Launched("none", 0, 1)
    assert check_environment(ring(rank="1"), "ring", 2) == Launched("ring", 1, 2)
    assert check_environment(jaccl(3), "jaccl") == Launched("jaccl", 1, 3)
    on_ring = jaccl(3, MLX_JACCL_RING="1")
    assert check_environment(on_ring) == Launched("jaccl-ring", 1, 3)
    mpi = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    assert check_environment(mpi, "mpi", 4) == Launched("mpi", 3, 4)
    assert check_environment({"PMIX_RANK": "0"}) == Launched("mpi", None, None)


@pytest.mark.parametrize("hosts", ["", "\n", [["127.0.0.1:5001"]]])
def test_a_launcher_of_one_rank(ring, hosts):
    # `mlx.launch -n 1` writes an empty hostfile.
    assert check_environment(ring(hosts), "ring", 1) == Launched("ring", 0, 1)


@pytest.mark.parametrize(
    ("hosts", "rank", "text"),
    [
        ("not JSON", "0", "must name a file of JSON"),
        ("[]", "0", "one non-empty list for each rank, got '\\[\\]'"),
        ("[[]]", "0", "one non-empty list for each rank"),
        ([{"ssh": "a", "ips": ["b"]}], "0", "goes to mlx.launch --hostfile"),
        ({"hosts": []}, "0", "goes to mlx.launch --hostfile"),
        ([[1], [2]], "0", r"got \[1\] for rank 0"),
        (TWO, "2", "MLX_RANK must be a rank, 0 to 1, got '2'"),
        (TWO, "-1", "MLX_RANK must be a rank, 0 to 1, got '-1'"),
        (TWO, "one", "got 'one'"),
        ("", "1", "MLX_RANK must be a rank, 0 to 0, got '1'"),
    ],
)
def test_a_bad_ring_is_refused(ring, hosts, rank, text):
    with pytest.raises(ValueError, match=text):
        check_environment(ring(hosts, rank))


def test_a_ring_needs_both_variables(ring):
    environ = ring()
    with pytest.raises(ValueError, match="MLX_RANK must be a rank, 0 to 1, got None"):
        check_environment({"MLX_HOSTFILE": environ["MLX_HOSTFILE"]})
    with pytest.raises(ValueError, match="nccl is not supported"):
        check_environment({"MLX_RANK": "0"})
    missing = {"MLX_HOSTFILE": "/no/such/file", "MLX_RANK": "0"}
    with pytest.raises(ValueError, match=r"'/no/such/file' \(No such file"):
        check_environment(missing)


def test_a_bad_jaccl_is_refused(jaccl):
    with pytest.raises(ValueError, match="jaccl connects at most 8 ranks, got 9"):
        check_environment(jaccl(9))
    # The limit is that of the mesh.
    assert check_environment(jaccl(9, MLX_JACCL_RING="1")).num_ranks == 9
    with pytest.raises(ValueError, match="MLX_JACCL_COORDINATOR must be the address"):
        check_environment(jaccl(2, MLX_JACCL_COORDINATOR=""))
    environ = jaccl(2)
    with open(environ["MLX_IBV_DEVICES"], "w") as file:
        json.dump([[None, "rdma_en1"], ["rdma_en0"]], file)
    with pytest.raises(ValueError, match=r"got 2 ranks and \[2, 1\] devices"):
        check_environment(environ)
    open(environ["MLX_IBV_DEVICES"], "w").close()
    with pytest.raises(ValueError, match="must name a file of JSON"):
        check_environment(environ)


@pytest.mark.parametrize("num_ranks", [0, -2])
def test_no_ranks_are_refused(num_ranks):
    with pytest.raises(ValueError, match=f"at least 1, got {num_ranks}"):
        init(num_ranks=num_ranks)


def test_another_number_of_ranks_is_refused(ring):
    text = "got 2, but no launcher started this process: .* mlx.launch -n 2 -- ..."
    with pytest.raises(ValueError, match=text):
        init(num_ranks=2)
    text = "got 3, but the launcher for ring started 2: .* mlx.launch -n 3 -- ..."
    with pytest.raises(ValueError, match=text):
        check_environment(ring(), "any", 3)
    with pytest.raises(ValueError, match="got 1, but the launcher for ring started 2"):
        check_environment(ring(), "any", 1)


def test_another_backend_is_refused(ring):
    text = "'mpi' needs .* but no launcher .* mlx.launch --backend mpi -n 2 -- ..."
    with pytest.raises(ValueError, match=text):
        init("mpi")
    with pytest.raises(ValueError, match="but a launcher for ring started"):
        check_environment(ring(), "jaccl")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'nccl'"):
        check_environment({}, "nccl")


def test_one_process_is_a_group(monkeypatch):
    comm = init()
    assert (comm.rank, comm.size, comm.transport) == (0, 1, "none")
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, got 0"):
        init(timeout=0.0)
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "1")
    with pytest.warns(UserWarning, match="MLX_METAL_FAST_SYNCH is set"):
        init()
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "0")
    assert init(num_ranks=1).size == 1
    # mpirun -n 1: MLX's MPI refuses a world of one process.
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert init("mpi", 1).transport == "none"


INIT = (
    "import sys, mlx.core as mx; from mlx_ep.comm import init;"
    "comm = init(num_ranks=int(sys.argv[1]), timeout=float(sys.argv[2]));"
    "mx.eval(comm.all_reduce(mx.array(1)));"
    "print(comm.rank, comm.size, comm.transport)"
)


@pytest.mark.requires("ranks")
def test_ranks_join():
    outcomes = run_commands(2, [sys.executable, "-c", INIT, "2", "30"])
    assert [(o.returncode, o.stdout) for o in outcomes] == [
        (0, "0 2 ring\n"),
        (0, "1 2 ring\n"),
    ]
    outcomes = run_commands(2, [sys.executable, "-c", INIT, "3", "30"])
    text = "got 3, but the launcher for ring started 2"
    assert all(text in outcome.stderr for outcome in outcomes)
    assert [outcome.returncode for outcome in outcomes] == [1, 1]


def join_after_mlx(group):
    # The environment is that of mpirun; MLX has connected, `init` finds the group.
    comm = init("mpi", 2)
    return comm.transport, comm.rank, comm.size, mx.distributed.is_available("mpi")


@pytest.mark.requires("mpi")
def test_ranks_join_over_mpi():
    results = run_ranks(2, join_after_mlx, transport="mpi")
    assert results == [("mpi", 0, 2, True), ("mpi", 1, 2, True)]


@pytest.mark.requires("ranks")
@pytest.mark.parametrize("hosts", ["\n", [["127.0.0.1:5001"]]])
def test_one_launched_rank_does_not_wait_for_itself(ring, hosts):
    command = [sys.executable, "-c", INIT, "1", "20"]
    (outcome,) = run_commands(1, command, env=ring(hosts))
    assert (outcome.returncode, outcome.stdout) == (0, "0 1 none\n")


@pytest.mark.requires("ranks")
def test_a_rank_that_never_starts_ends_the_wait(ring):
    command = [sys.executable, "-c", INIT, "2", "2"]
    (outcome,) = run_commands(1, command, env=ring(rank="0"))
    assert outcome.returncode == 1
    assert "of 2 ranks, [1] did not come within 2 s" in outcome.stderr
    assert "in wait_ready" in outcome.stderr  # where rank 0 was
