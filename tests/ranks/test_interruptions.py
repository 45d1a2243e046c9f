"""Commands that are interrupted or told to end on 2 ranks: soon, and in one line."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from mlx_ep.overlay.make import make_overlay
from tests.support.ranks import RankOutcome, start_commands
from tests.support.waiting import until

pytestmark = [pytest.mark.requires("ranks"), pytest.mark.slow]

SECONDS = 2.0  # docs/reliability.md
WORDS = "What is a kludge? "


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Command lines that run for long."""
    folder = tmp_path_factory.mktemp("interruptions")
    text = folder / "text"
    text.write_text(WORDS * 20000)
    overlay = folder / "overlay"
    make_overlay("jargon-moe", overlay)
    return {
        "perplexity": [
            "mlx_ep.perplexity", "--text", str(text), "--sequence-length", "64",
            "--num-samples", "-1",
        ],
        "cache_prompt": [
            "mlx_ep.cache_prompt", "--prompt", "-", "--prefill-step-size", "2",
            "--prompt-cache-file", str(folder / "cache.safetensors"),
        ],
        "overlay": [
            "mlx_lm", "chat", "--model", str(overlay), "--trust-remote-code",
            "--max-tokens", "100000",
        ],
    }  # fmt: skip


SAYS = {  # on the standard output or error of rank 0, when it is at work
    "perplexity": "warm-up",
    "cache_prompt": "token/s",
    "overlay": "backend:",
}


@pytest.mark.parametrize("is_told_to_all", [False, True], ids=["one", "all"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
@pytest.mark.parametrize("name", SAYS)
def test_all_end_soon_and_say_why(
    commands: dict[str, list[str]],
    name: str,
    number: signal.Signals,
    code: int,
    is_told_to_all: bool,
) -> None:
    argv = [sys.executable, "-m", *commands[name]]
    with start_commands(2, argv, stdin=WORDS * 400) as started:
        until(
            lambda: SAYS[name] in _said(started.outcome(0)), lambda: started.outcome(0)
        )
        time.sleep(0.3)
        assert [process.poll() for process in started.processes] == [None, None]
        told = time.monotonic()
        for process in started.processes[0 if is_told_to_all else 1 :]:
            process.send_signal(number)
        outcomes = started.wait()
        seconds = time.monotonic() - told
    assert seconds < SECONDS
    words = "interrupted (Ctrl-C)" if number == signal.SIGINT else "told to end"
    for outcome in outcomes:
        assert outcome.returncode == code, outcome
        assert outcome.stderr.count(words) == 1, outcome
        assert "Traceback" not in outcome.stderr
    written = Path(commands["cache_prompt"][-1])
    assert not list(written.parent.glob("*.safetensors")), "half a cache"


def _said(outcome: RankOutcome) -> str:
    return outcome.stdout + outcome.stderr
