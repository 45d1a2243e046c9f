"""One rank's failure ends the run on all ranks, whatever the others are doing.

While a rank is dead the others wait inside a collective that may never return: MPI and
JACCL have no timeout, and Python's signal handlers do not run while the main thread is
in C++. So a small process watches each rank (`mlx_ep.comm.control`); this is the rank's
side of it. A rank that raises, dies, stops, is interrupted, loses its network or passes
a limit (`Limits`) ends all, with one report by rank 0. A rank ends by `os._exit`, since
the ordinary way out (MPI_Finalize, destructors) waits for the dead rank; where it does
not answer, its watch kills it.

`start_early` begins before the group exists, `guard` is for everything after.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import mlx.core as mx

from mlx_ep.comm.channel import GOODBYE_LIMIT, TOLD_TO_END, Liveness, say
from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.meeting import find_meeting, own_addresses
from mlx_ep.comm.control.progress import LayerStage
from mlx_ep.comm.environment import Launched
from mlx_ep.comm.objects import shortened

__all__ = [
    "Liveness",
    "UsageError",
    "guard",
    "start_early",
    "fail_with",
    "joined_texts",
    "on_end",
    "note_layer",
    "note_progress",
    "note_step",
    "note_prefill",
    "note_decode",
]

MOST_DETAILS = 20_000  # characters of a traceback
ROOT_CAUSE_GRACE = 1.0  # seconds for word of a failure that explains our own
T = TypeVar("T")


class UsageError(Exception):
    """Wrong usage, which all ranks are to report together, in one line."""


def start_early(launched: Launched, limits: Limits | None = None) -> Liveness | None:
    """The control channel before the group exists; None where there is none to have.

    Called again, it gives the same. Without it, what fails before `guard` is not seen.

    Raises:
        ValueError: MLX_EP_SECRET, MLX_EP_CONTROL or MLX_EP_LIMITS is malformed.
    """
    if launched.rank is None or launched.num_ranks in (None, 1):
        return None
    assert launched.num_ranks is not None
    if Liveness.current is None:
        meeting = find_meeting(os.environ, launched.transport, launched.hosts)
        limits = limits or Limits().changed_by(os.environ)
        return Liveness(launched.rank, launched.num_ranks, meeting, limits)
    return Liveness.current


@contextmanager
def guard(
    group: mx.distributed.Group | None = None, limits: Limits | None = None
) -> Iterator[Liveness | None]:
    """Runs the body so that its failure on any rank ends the run on all of them.

    Enter it on all ranks, on the main thread, right after `mlx_ep.comm.init` (which
    watches from its own start on) or `mx.distributed.init` (what fails before is not
    seen then). Ctrl-C and SIGTERM end the run, also where the body catches what they
    raise; a program that has handlers of its own for them keeps these. On one rank it
    only turns Ctrl-C into exit code 130.

    Args:
        group: The group that runs the body, by default the global one.
        limits: How long things may take, by default `Limits` and MLX_EP_LIMITS; those
            of `mlx_ep.comm.init` if it started the channel.

    Yields:
        The channel, for `fail`; None on one rank.

    Raises:
        UsageError: the body raised it on every rank; the text is that of all ranks.
    """
    group = mx.distributed.init() if group is None else group
    if group.size() == 1:
        try:
            yield None
        except KeyboardInterrupt:
            say("[mlx_ep] interrupted (Ctrl-C)")
            raise SystemExit(130) from None
        return
    clean_exit: SystemExit | None = None
    usage_texts: list[str] = []
    try:
        channel = Liveness.start(group, limits)
        try:
            yield channel
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            clean_exit = error
        except UsageError as error:
            usage_texts = channel.leave_with_usage_error(str(error))
        else:
            channel.close()
        if clean_exit is not None:
            channel.close()
    # Everything, KeyboardInterrupt and SystemExit included: whatever takes this rank
    # out of the run must reach the others. Nothing is swallowed, the process ends.
    except BaseException as error:
        fail_with(error)
    if clean_exit is not None:
        raise clean_exit
    if usage_texts:
        raise UsageError(joined_texts(usage_texts))


def joined_texts(texts: list[str]) -> str:
    """What the ranks found, once where it is the same."""
    if len(set(texts)) == 1:
        return texts[0]
    return " ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))


def fail_with(error: BaseException) -> NoReturn:
    """Ends the run on all ranks because of an exception; without a channel, raises."""
    channel = Liveness.current
    if channel is None:
        raise error
    channel.is_failing = True
    if isinstance(error, KeyboardInterrupt):
        channel.announce(f"rank {channel.rank} was interrupted (Ctrl-C)", 130)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        if code - 128 in TOLD_TO_END:
            name = signal.Signals(code - 128).name
            channel.announce(f"rank {channel.rank} was told to end ({name})", code)
        channel.fail(f"SystemExit: {error.code}", code)
    reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()))
    details = shortened("".join(traceback.format_exception(error)), MOST_DETAILS)
    code = 1
    if isinstance(error, FloatingPointError):  # NaN: the model's fault, not the code's
        reason, details, code = str(error), "", 2
    # A collective raises RuntimeError when a peer is gone. Word of why that peer went
    # says more than our traceback would.
    grace = ROOT_CAUSE_GRACE if isinstance(error, RuntimeError) else 0.0
    channel.announce(f"rank {channel.rank} failed: {reason}", code, details, grace)


def on_end(
    say_goodbye: Callable[[str], object] | None, seconds: float | None = None
) -> None:
    """What to do in the last moment, when this rank ends because a rank has failed.

    Nothing without a control channel.

    Args:
        say_goodbye: is called with the reason, on a thread of its own, while the main
            thread may be stuck. None: nothing.
        seconds: that it has; None: 0.2.
    """
    if Liveness.current is not None:
        limit = GOODBYE_LIMIT if seconds is None else seconds
        Liveness.current.say_at_end(say_goodbye, limit)


def rank_0_addresses() -> tuple[str, ...]:
    """On rank 0: where the other ranks reach it, as the launcher told or as it finds.

    The watch of rank 0 listens at these.
    """
    told = Liveness.current.meeting.addresses if Liveness.current else ()
    return told or own_addresses()


def note_progress(
    phase: str | None = None,
    step: int | None = None,
    layer: int | None = None,
    stage: str = "",
) -> None:
    """Says where this rank is, for the limits and for the report of a failure.

    It costs about a microsecond, and nothing without a control channel. A new phase
    or step starts its time anew, a layer or stage does not.

    Args:
        phase: "loading", "warmup", "prefill" and "decode" have limits (`Limits`);
            "running" and "waiting" have none. None: as before.
        step: of the phase. None: as before.
    """
    if Liveness.current is not None:
        Liveness.current.note(phase, step, layer, stage)


def note_layer(layer: int, stage: LayerStage) -> None:
    """Says where in the MoE layer of a step this rank is, for the report of a failure.

    MLX is lazy: a stage that waits for nothing is over when its graph is built, and
    what was built is computed where the host waits, in this layer or after the last
    (`evaluating up to here`). It costs a fraction of a microsecond.

    Args:
        layer: its number in the model; -1: it has none.
    """
    if Liveness.current is not None:
        Liveness.current.visit(layer, stage)


def note_step(*numbers: int) -> None:
    """Says what this step computed, such as a token or a length, none negative.

    The watches compare the fingerprint of all steps so far between ranks, twice a
    second and beside the run: no collective and no wait. Ranks that differ end, with a
    report. Every rank must call it alike. It costs about two microseconds.
    """
    if Liveness.current is not None:
        Liveness.current.mark(*numbers)


def note_prefill(num_done: int, num_tokens: int) -> None:
    """A `prompt_progress_callback` for mlx-lm: each chunk of a prompt is a step."""
    note_progress("prefill", num_done)
    note_step(num_done, num_tokens)


def note_decode(responses: Iterable[T]) -> Iterator[T]:
    """The responses of mlx-lm's `stream_generate`, each of which is a step."""
    for step, response in enumerate(responses):
        note_progress("decode", step)
        note_step(int(getattr(response, "token", 0)))
        yield response
    note_progress("running")
