"""A rank that serves two long answers, as a command: ``KIND [local]``.

KIND is what goes wrong; with ``local`` every rank has every expert, and ranks tell each
other over sockets.

Rank 0 prints each event that ends a request. In a step, the last rank raises
(``raise``), or kills or stops itself (``SIGKILL``, ``SIGSTOP``).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from mlx_ep.comm import GroupComm, guard, init
from mlx_ep.loading import find_model
from mlx_ep.server.requests import Request, Sampling, Token
from tests.support.serving import LOCAL, load_engine

FAILS_AT = 30  # step


def main() -> None:
    kind = sys.argv[1]
    comm: GroupComm = init()
    with guard(comm.group):
        config = LOCAL if "local" in sys.argv else {}
        engine = load_engine(comm.group, str(find_model("jargon-moe")), config, {})
        assert (engine._exchange._gather is not None) == ("local" in sys.argv)
        if comm.rank == comm.size - 1:
            _fail_later(engine._worker, kind)
        if comm.rank == 0:
            _ask(engine)
        engine.run()


def _ask(engine: Any) -> None:
    bias = Sampling(logit_bias={40: 100.0})  # it does not end
    for name in ("first", "second"):
        engine.submit(Request(name, (0, 2, 305, 3), 4000, bias), _say)


def _say(event: Token) -> None:
    if event.finish_reason is not None:
        print(event.request, event.finish_reason, event.message, flush=True)


def _fail_later(worker: Any, kind: str) -> None:
    step, count = worker.step, 0

    def fail(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == FAILS_AT and kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, kind))
        elif count == FAILS_AT:
            raise ZeroDivisionError("a step went wrong")
        step(*arguments)

    worker.step = fail


if __name__ == "__main__":
    main()
