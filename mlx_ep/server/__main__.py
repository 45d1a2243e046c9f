"""``mlx_ep.server``: the model on all ranks, the endpoint on rank 0."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from dataclasses import replace
from types import FrameType

import mlx.core as mx
import mlx.nn as nn

from mlx_ep import cli
from mlx_ep.comm import Comm, GroupComm, agreed, default_cpu_stream
from mlx_ep.config import EPConfig
from mlx_ep.cost.shape import ModelShape
from mlx_ep.loading import (
    checkpoint_weights,
    dummy_weights,
    find_model,
    model_shape,
    read_config,
    refuse_dense,
)
from mlx_ep.server.app import make_app
from mlx_ep.server.attention import choose_config
from mlx_ep.server.build import build_engine
from mlx_ep.server.copies import CopiesRoom, copies_room, may_copy, rank_memory
from mlx_ep.server.engine import ServingEngine
from mlx_ep.server.flags import make_parser, model_names
from mlx_ep.server.listener import Listener, open_port
from mlx_ep.server.service import Service
from mlx_ep.server.texts import Texts

_log = logging.getLogger("mlx_ep")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# HTTP's thread gives up Python's lock with each part that it sends, and would wait ten
# times as long for the engine's to give it back: 70 ms until eight answers had ended.
SWITCH_SECONDS = 0.0005


class Ending:
    """SIGTERM and Ctrl-C: the first drains, the second ends.

    A launcher signals all ranks; rank 0 knows what is in flight, so that the others
    leave the first one to it. Before there is an engine, either ends the run.
    """

    def __init__(self) -> None:
        self._is_first = cli.rank_of_environment() == 0
        self._engine: ServingEngine | None = None
        self._grace = 0.0
        self._count = 0

    def catch(self) -> None:
        """Before the ranks meet, or a signal would end all of them at once."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def serve(self, engine: ServingEngine, grace: float) -> None:
        """From here on there is something to drain."""
        self._engine, self._grace = engine, grace

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._engine is None or self._count > 2:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        if not self._is_first:
            return
        if self._count == 2:
            self._engine.stop("the server was told to end at once")
            return
        self._engine.drain()
        after = threading.Timer(
            self._grace,
            self._engine.stop,
            (f"the server ends; the grace of {self._grace:g} s is over",),
        )
        after.daemon = True
        after.start()


def main() -> None:
    ending = Ending()
    ending.catch()
    cli.run(make_parser(), lambda args, comm: _serve(args, comm, ending))


def _serve(args: argparse.Namespace, comm: Comm, ending: Ending) -> None:
    comm = _in_one_stream(comm, args.config)
    config = {"chat_template": args.chat_template} if args.chat_template else {}
    with cli.usage_errors():
        if args.use_default_chat_template:
            _log.warning("--use-default-chat-template has no effect")
        port = agreed(
            comm, lambda: open_port(args.host, args.port) if comm.rank == 0 else None
        )
        if args.config.attention == "auto" or args.data:
            _choose_attention(args, comm)
        prepared = cli.prepare_model(args, comm, config)
    model, tokenizer = prepared.load()
    cli.print_reports(model, comm, args.config)
    with cli.usage_errors():
        engine = build_engine(model, tokenizer, comm, args.options)
    if port is None:
        ending.serve(engine, args.grace)
        engine.run()
        return
    print(engine.describe(), flush=True)
    texts = Texts(tokenizer, args.chat_template_args)
    names = model_names(args.model, args.model_alias)
    sys.setswitchinterval(SWITCH_SECONDS)

    def make_service() -> Service:
        return Service(engine, texts, names, args.defaults, args.access)

    listener = Listener(make_app(make_service, args.access), port, args.limits)
    engine.goodbye = listener.linger
    listener.start()
    ending.serve(engine, args.grace)
    host, number = port.getsockname()[:2]
    _warn_of_strangers(host, args.access.api_keys)
    print(f"serving {names.names[0]} at http://{host}:{number}/v1", flush=True)
    engine.run()
    listener.stop()


def _in_one_stream(comm: Comm, config: EPConfig) -> Comm:
    """Collectives on the thread that computes, where that is a CPU's.

    On a thread of their own every layer is handed over twice, and a CPU that waits for
    other ranks has nothing else to compute, unless it was told so. The server has no
    loop of mlx-lm's, whose stream would be another one.
    """
    computes_here = mx.default_device().type == mx.cpu and config.overlap == "none"
    if not computes_here or not isinstance(comm, GroupComm):
        return comm
    return GroupComm(comm.group, stream=default_cpu_stream)


def _choose_attention(args: argparse.Namespace, comm: Comm) -> None:
    """A configuration for `--attention auto`, and copies for `data`, by shapes alone.

    Every rank must call it.
    """
    config: EPConfig = args.config
    is_auto = config.attention == "auto"
    chooses_copies = args.chooses_copies and may_copy(config, comm.size)
    if not is_auto and not chooses_copies:
        return
    memory = rank_memory(config, comm)

    def look() -> tuple[ModelShape | None, nn.Module, CopiesRoom | None]:
        path = find_model(
            args.model,
            args.revision,
            with_weights=not args.dummy_weights,
            download=config.download,
        )
        weights_of = dummy_weights if args.dummy_weights else checkpoint_weights
        found = read_config(path)
        plain = replace(config, attention="replicated")
        if chooses_copies:  # its outline has all experts
            plain = replace(plain, strategy="auto", replica_memory="all", memory=None)
        weights = weights_of(path, comm.rank, comm.size, plain)
        outline, num_experts = weights.outline(), weights.placement.num_experts
        if is_auto:
            refuse_dense(num_experts, "--attention auto of the server")
        room = None
        if chooses_copies and num_experts:
            room = copies_room(outline, args.options, comm.size, memory)
        shape = model_shape(found, name=args.model) if is_auto else None
        return shape, outline, room

    shape, outline, room = agreed(comm, look)
    if shape is not None:
        args.config, choice = choose_config(
            config, comm, args.options, shape, outline, room
        )
        if comm.rank == 0:
            print(choice, flush=True)
        args.data = choice.mode == "data"
    if room is None or not args.data:
        return
    if room.fits or args.config.strategy == "local":
        args.config = replace(args.config, replica_memory="all")
    if comm.rank == 0:
        print(room, flush=True)


def _warn_of_strangers(host: str, keys: tuple[str, ...]) -> None:
    if not keys and not host.startswith("127.") and host != "::1":
        _log.warning(
            "everybody who reaches %s may ask: there is no API key (--api-key)", host
        )


if __name__ == "__main__":
    main()
