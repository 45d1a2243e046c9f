"""The model of an overlay, as mlx-lm gets it from the overlay's Python file.

    mlx_lm.server, chat, benchmark              sharded_load() -> shard(group)
    mlx_lm.generate, cache_prompt, perplexity   load() -> load_weights(strict=True)

On one rank neither does anything of its own: mlx-lm loads the model as ever.
"""

from __future__ import annotations

import atexit
import json
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import generation_stream
from mlx_lm.utils import _get_classes

from mlx_ep import cli
from mlx_ep.api import prepare
from mlx_ep.comm import GroupComm, default_cpu_stream
from mlx_ep.comm.liveness import Liveness, fail_with
from mlx_ep.config import EPConfig
from mlx_ep.loading import OVERLAY_FILE, read_config

# The modules of mlx-lm whose ranks all do the same: those that EP can serve.
_ALIKE = ("generate", "chat", "server", "benchmark", "perplexity", "cache_prompt")
_WHY_NOT = {
    "evaluate": "it is data-parallel by design: each rank runs other requests on a "
    "whole model of its own, and would wait for experts that the others never serve. "
    "For perplexity there is mlx_ep.perplexity",
}


@dataclass(frozen=True)
class OverlaySettings:
    """What an overlay was made with; in its mlx_ep.json.

    Attributes:
        source: the model's folder.
        config: how the model is made expert-parallel.
        ranks: the number of ranks that it must run on; None is any.
    """

    source: Path
    config: EPConfig
    ranks: int | None = None

    def save(self, folder: Path) -> None:
        values = {
            "source": str(self.source),
            "ranks": self.ranks,
            "config": asdict(self.config),
        }
        (folder / OVERLAY_FILE).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> OverlaySettings:
        """Raises:
        ValueError: the overlay or its model is not in order.
        """
        try:
            values = json.loads((folder / OVERLAY_FILE).read_text())
            config = EPConfig.from_dict(values["config"])
            return cls(Path(values["source"]), config, values["ranks"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder} is not an overlay of this version of mlx_ep ({error}). Make "
                "it again with mlx_ep.overlay."
            ) from error


def model_classes(file: str) -> tuple[type[nn.Module], type]:
    """The classes that an overlay's Python file gives to mlx-lm.

    Args:
        file: the path of that Python file.

    Returns:
        A subclass of the architecture's model class, under the same name and module,
        and its class of arguments.

    Raises:
        ValueError: the overlay or its model is not in order.
    """
    settings = OverlaySettings.load(Path(file).resolve().parent)
    found, args_class = _get_classes(dict(read_config(settings.source)))

    class OverlayModel(found):  # type: ignore[valid-type, misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            self._is_ready = False
            inner: Any = getattr(self, "model", None)
            if mx.distributed.init().size() > 1 and hasattr(inner, "pipeline"):
                inner.pipeline = _no_pipeline

        def shard(self, group: mx.distributed.Group | None = None) -> None:
            """Become this rank's part of the model; called by sharded_load()."""
            group = group or mx.distributed.init()
            if group.size() > 1:
                _take_over(self, _load_on_rank(settings, group))
                self._is_ready = True

        def load_weights(self, weights: Any, strict: bool = True) -> nn.Module:
            # load() is strict, and never calls shard(). sharded_load() is not strict,
            # and makes the model twice: what it gives is lazy and may go unread.
            if self._is_ready:
                raise ValueError(
                    "An expert-parallel model takes no further weights: adapters do "
                    "not go with several ranks."
                )
            if strict and mx.distributed.init().size() > 1:
                if any(isinstance(module, nn.QQLinear) for module in self.modules()):
                    raise ValueError(
                        "--quantize-activations does not go with several ranks."
                    )
                self.shard()
                return self
            return super().load_weights(weights, strict=strict)

    # mlx-lm looks for the processor of images beside the model's class.
    OverlayModel.__module__ = found.__module__
    OverlayModel.__name__ = found.__name__
    OverlayModel.__qualname__ = found.__qualname__
    return OverlayModel, args_class


def _load_on_rank(settings: OverlaySettings, group: mx.distributed.Group) -> nn.Module:
    """This rank's part of an overlay's model. Every rank must call it.

    Raises:
        ValueError: on every rank: the command or the model does not allow it.
    """
    tool = _check_caller()
    if tool == "cache_prompt" and settings.config.attention != "replicated":
        raise ValueError(
            "A prompt cache holds the KV cache of all heads: mlx_lm.cache_prompt needs "
            "an overlay with --attention replicated, got "
            f"{settings.config.attention}."
        )
    if settings.ranks not in (None, group.size()):
        raise ValueError(
            f"This overlay was made with --ranks {settings.ranks}, got {group.size()}."
        )
    # mlx-lm's server tells the other ranks of a request by all_sum, without a stream,
    # from the thread that also runs the model. On a stream of our own a layer's sum
    # that is still in flight (mlx-lm starts a step ahead) would share the sockets with
    # it. On the default CPU stream both are one queue. In the other commands the model
    # runs inside `with mx.stream(generation_stream)`: on Metal that leaves the default
    # CPU stream as it is, on CPU hosts it is the default; only loading runs outside of
    # it, and is evaluated before. This is where mlx-lm's own tensor parallelism
    # reduces, too.
    comm = GroupComm(group, stream=default_cpu_stream)
    prepared = prepare(
        str(settings.source),
        comm,
        settings.config,
        tokenizer_config={"trust_remote_code": True},  # or mlx-lm would not be here
    )
    _end_together(comm)
    model, _ = prepared.load()
    state = model.expert_parallel
    if state.group.share_routing:
        print(
            "mlx_ep: the ranks differ in chip or MLX version. mlx-lm samples on each "
            "rank by itself: where they round differently, texts part and ranks hang. "
            "Use mlx_ep.generate or mlx_ep.chat.",
            file=sys.stderr,
        )
    cli.print_reports(model, comm, settings.config, sys.stderr)
    return model


def _end_together(comm: GroupComm) -> None:
    """See to it that a rank that fails or is killed ends all, as our commands do.

    mlx-lm's server loads the model on a thread of its own, and its ranks do not leave
    together: the first that leaves, rank 0 at Ctrl-C, ends the others.
    """
    liveness = Liveness.start(comm.group)
    if threading.current_thread() is not threading.main_thread():
        text = f"rank {comm.rank} has ended its server"
        atexit.register(liveness.announce, text, 130)
        return

    def fail(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        fail_with(error)  # with the traceback; an interruption has none

    def leave() -> None:
        # mlx-lm begins the step after the last token too: a rank that left now would
        # take its part of that step's collectives away from the others. The step is in
        # the queue of this stream, and the barrier behind it.
        try:
            with mx.stream(generation_stream):
                comm.barrier()
        except KeyboardInterrupt as error:  # atexit would only print it
            fail_with(error)
        # All is said and done: Ctrl-C from here on would only spoil the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        liveness.close()  # which gives signals the handlers back that they had
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    sys.excepthook = fail
    atexit.register(leave)


def _check_caller() -> str:
    """The command of mlx-lm that loads the model; "" is a script of the user's.

    Raises:
        ValueError: it is not one for EP.
    """
    folder = Path(mlx_lm.__file__).parent
    frame = sys._getframe()
    callers = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if folder in file.parents and file.stem not in ("utils", "cli", "__main__"):
            callers.append(file.stem)
        frame = frame.f_back  # type: ignore[assignment]
    tool = callers[-1] if callers else ""
    if not tool or tool in _ALIKE:
        return tool
    why = _WHY_NOT.get(tool, "it changes or copies whole models")
    raise ValueError(
        f"mlx_lm.{tool} cannot run expert-parallel: {why}. Use the model itself, on "
        "one rank."
    )


def _take_over(model: nn.Module, loaded: nn.Module) -> None:
    """Give `model` all that `loaded` has; mlx-lm holds on to the object."""
    model.clear()
    dict.update(model, loaded)
    vars(model).clear()
    vars(model).update(vars(loaded))


def _no_pipeline(group: mx.distributed.Group) -> None:
    raise ValueError(
        "--pipeline spreads layers and not experts: leave it out, or use the model "
        "itself instead of its overlay."
    )
