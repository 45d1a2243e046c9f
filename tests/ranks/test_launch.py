"""mlx_ep.launch: what it starts, what it prints, and the exit code it gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ep.launch import run as launch_run
from mlx_ep.launch.__main__ import main
from mlx_ep.launch.flags import make_parser
from mlx_ep.launch.transport import transport
from tests.support.launchers import MPI_AS_ROOT, rank_environment
from tests.support.waiting import LONG

pytestmark = pytest.mark.requires("ranks")

LAUNCH = [sys.executable, "-m", "mlx_ep.launch"]
# Prints what a rank gets, and what the first argument says it does then.
PROGRAM = """
import json, os, signal, sys, time
rank = int(os.environ.get("MLX_RANK", 0))
hosts = os.environ.get("MLX_HOSTFILE")
sys.stdout.write(json.dumps({"rank": rank, "secret": os.environ["MLX_EP_SECRET"],
    "hosts": json.load(open(hosts)) if hosts else None,
    "extra": os.environ.get("EXTRA"), "stdin": sys.stdin.read()}) + "\\n")
sys.stdout.flush()
print("an error", file=sys.stderr, flush=True)
what = sys.argv[1] if rank == int(sys.argv[2]) else "wait"
if what == "fail": sys.exit(3)
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "wait" and sys.argv[1] != "end": time.sleep(600)
"""


def launch(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *argv], capture_output=True, text=True, timeout=LONG, input=stdin
    )


@pytest.fixture
def program(tmp_path: Path) -> str:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return str(file)


def test_what_a_rank_gets_and_what_it_prints(program: str) -> None:
    done = launch(
        "-n", "3", "--env", "EXTRA=a b", "--", program, "end", "0", stdin="hello"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first = next(line for line in lines if line.startswith("{"))  # rank 0, unmarked
    ranks = [json.loads(first)]
    for rank in (1, 2):
        mark = f"[rank {rank}] "
        (line,) = (line for line in lines if line.startswith(mark))
        ranks.append(json.loads(line.removeprefix(mark)))
        assert f"{mark}an error\n" in done.stderr
    assert [rank["rank"] for rank in ranks] == [0, 1, 2]
    assert [rank["stdin"] for rank in ranks] == ["hello", "", ""]
    assert {rank["extra"] for rank in ranks} == {"a b"}
    assert len({rank["secret"] for rank in ranks}) == 1
    assert len(ranks[0]["secret"]) >= 32
    assert len({json.dumps(rank["hosts"]) for rank in ranks}) == 1
    assert len({tuple(host) for host in ranks[0]["hosts"]}) == 3


@pytest.mark.parametrize("victim", ["0", "1"])
@pytest.mark.parametrize(("what", "code"), [("fail", 3), ("kill", 128 + 9)])
def test_the_code_of_the_rank_that_fails_first(
    program: str, what: str, code: int, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others, which would sleep for ten, are ended."""
    patched = [sys.executable, "-c", (
        "import sys; from mlx_ep.launch import main, run; run._GRACE = 0.5;"
        f"sys.argv = {['mlx_ep.launch', '-n', '2', '--', program, what, victim]!r};"
        "main()"
    )]  # fmt: skip
    done = subprocess.run(
        patched, capture_output=True, text=True, timeout=LONG, input=""
    )
    assert done.returncode == code, done.stderr
    assert f"rank {victim} (127.0.0.1) ended with code {code}" in done.stderr


def test_a_launcher_that_is_told_to_end_ends_the_ranks(program: str) -> None:
    started = subprocess.Popen(
        [*LAUNCH, "-n", "2", "--", program, "wait", "0"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    for _ in range(2):
        assert "secret" in started.stdout.readline()
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=LONG) == 128 + signal.SIGTERM
    started.stdout.close()


def test_wrong_usage_of_the_command() -> None:
    done = launch("-n", "2", "--", "mlx_ep.generate", "--no-such-flag")
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_it_runs_the_commands() -> None:
    done = launch(
        "-n", "2", "--", "mlx_ep.generate", "--max-tokens", "4", "--ranks", "2"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rank 0: experts 0..7")
    assert "Generation: 4 tokens" in done.stdout


@pytest.mark.requires("mpi")
def test_mpi(program: str) -> None:
    command = [
        *LAUNCH,
        "--backend",
        "mpi",
        "-n",
        "2",
        "--mpi-arg=--oversubscribe",
        "--",
    ]
    for started, code in (
        (["mlx_ep.generate", "--max-tokens", "4", "--ranks", "2"], 0),
        ([program, "fail", "0"], 3),
    ):
        done = subprocess.run(
            [*command, *started],
            capture_output=True, text=True, timeout=LONG, stdin=subprocess.DEVNULL,
            env=rank_environment(MPI_AS_ROOT),
        )  # fmt: skip
        assert done.returncode == code, done.stderr


def remote_script(argv: list[str], rank: int) -> str:
    """What the shell of another host would run."""
    args = make_parser().parse_args(argv)
    run = launch_run.StartedRanks(args, *transport(args))
    script = run._script(rank)
    run._folder.cleanup()
    return script


def test_a_file_of_all_ranks_is_written_once() -> None:
    """The first ranks read it while the last ones start."""
    args = make_parser().parse_args(["-n", "3", "--", sys.executable])
    run = launch_run.StartedRanks(args, *transport(args))
    path = Path(run._environment(0)["MLX_HOSTFILE"])
    assert len(json.loads(path.read_text())) == 3
    path.write_text("rank 0 reads this")
    assert run._environment(1)["MLX_HOSTFILE"] == str(path)
    assert path.read_text() == "rank 0 reads this"
    run._folder.cleanup()


def test_a_rank_on_another_host(tmp_path: Path) -> None:
    """Its script runs here in a shell: variables, files, the secret by the input."""
    code = (
        "import json, os; print(json.dumps([os.environ['MLX_RANK'],"
        "json.load(open(os.environ['MLX_HOSTFILE'])), os.environ['MLX_EP_SECRET'],"
        "os.getcwd()]))"
    )
    argv = [
        "--hosts",
        "10.0.0.1,10.0.0.2",
        "--cwd",
        str(tmp_path),
        "--",
        sys.executable,
    ]
    script = remote_script([*argv, "-c", code], 1)
    assert "secret words" not in script
    done = subprocess.run(
        script, shell=True, input="secret words\n", text=True, capture_output=True
    )
    rank, hosts, secret, folder = json.loads(done.stdout)
    assert (rank, secret, folder) == ("1", "secret words", str(tmp_path))
    assert hosts == [["10.0.0.1:32323"], ["10.0.0.2:32324"]]


HOST = {"ssh": "mac1", "ips": ["192.168.1.11"]}


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["-n", "2"], "There must be a command"),
        (["-n", "2", "--", "/no/such/program"], "must be a program here"),
        (["-n", "0", "--", "x"], "must be 1 or more, got 0"),
        (["--no-such-flag", "--", "x"], "unrecognized arguments: --no-such"),
        (["--env", "FOO", "--", "x"], "--env must be NAME=VALUE; got 'FOO'"),
        (["--hosts", "a,,b", "--", "x"], "--hosts must be names between commas"),
        (["--hosts", "-oProxyCommand=x", "--", "x"], "expected one argument"),
        (["--hosts=-oProxyCommand=x", "--", "x"], "--hosts must be names"),
        (["--mpi-arg=-x", "--", "x"], "--mpi-arg is of --backend mpi"),
        (["--backend", "nccl", "--", "x"], "invalid choice: 'nccl'"),
        (["--hostfile", "/no/such", "--", "x"], "--hostfile must be a file that can"),
        (["--hostfile", "{", "--", "x"], "must be JSON"),
        (["--hostfile", "[]", "--", "x"], "must hold a list of hosts"),
        (["--hostfile", "[1]", "--", "x"], 'host 0 must be an object with'),
        (["--hostfile", '[{"ssh": "-x"}]', "--", "x"], "host 0 must be an object with"),
        (["--hostfile", '[{"ssh": "a", "ips": ["b"]}]', "--", "x"], '"ips" must be'),
        (["--hostfile", '{"hosts": [{"ssh": "a"}], "backend": "x"}', "--", "x"],
         '"backend" must be one of'),
        (["--hostfile", '{"hosts": [{"ssh": "a"}], "envs": ["x"]}', "--", "x"],
         '"envs" must be a list'),
        (["--hostfile", '[{"ssh": "a"}]', "-n", "2", "--", "x"], "leave -n and"),
        (["--hosts", "mac1,mac2", "--", "x"], "The ring needs the address of every"),
        (["--backend", "jaccl", "--hostfile", json.dumps([HOST]), "--", "x"],
         'needs for every rank a list "rdma"'),
    ],
)  # fmt: skip
def test_wrong_usage(
    argv: list[str], text: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    if "--hostfile" in argv and not argv[argv.index("--hostfile") + 1].startswith("/"):
        file = tmp_path / "hosts.json"
        file.write_text(argv[argv.index("--hostfile") + 1])
        argv[argv.index("--hostfile") + 1] = str(file)
    monkeypatch.setattr(sys, "argv", ["mlx_ep.launch", *argv])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert text in said
    assert len(said.splitlines()) == 1
