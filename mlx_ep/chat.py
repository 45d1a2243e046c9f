"""Chat with an expert-parallel model: ``mlx_ep.chat``."""

from __future__ import annotations

import argparse
import atexit
import readline
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import common_prefix_len

from mlx_ep import cli
from mlx_ep.comm import Comm, broadcast_object, note_decode, note_prefill, note_progress
from mlx_ep.tune.cache import cache_folder

_HELP = (
    "Commands: /reset forgets the conversation, /help, /quit (or end of input).\n"
    "Ctrl-C stops an answer."
)
_HISTORY_LINES = 1000


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.chat",
        description="Chat with an expert-parallel model. " + _HELP,
    )
    cli.add_model_flags(parser)
    parser.add_argument(
        "--system-prompt", help="A system prompt for the chat template."
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=cli.positive,
        default=256,
        help="Most tokens of an answer.",
    )
    cli.add_record_flag(parser)
    cli.add_cache_flags(parser)
    cli.add_sampling_flags(parser, by_default=0)
    cli.add_ep_flags(parser)
    parser.finishers.append(_check)
    return parser


def _check(args: argparse.Namespace) -> None:
    cli.check_strategy(args.config)
    cli.check_cache_flags(args)


def main() -> None:
    interrupt = _Interrupt()
    if cli.rank_of_environment() == 0:
        interrupt.catch()
    cli.run(make_parser(), lambda args, comm: _chat(args, comm, interrupt))


def _chat(args: argparse.Namespace, comm: Comm, interrupt: _Interrupt) -> None:
    with cli.usage_errors():
        cli.check_record_name(args.record)
        prepared = cli.prepare_model(args, comm)
        cli.check_for_model(args, prepared)
        if not prepared.tokenizer.has_chat_template:
            raise ValueError(
                f"--model {args.model} has no chat template; use mlx_ep.generate."
            )
    model, tokenizer = prepared.load()
    cli.print_reports(model, comm, args.config)
    cli.seed_ranks(args.seed, prepared)
    conversation = Conversation(args, comm, model, tokenizer, interrupt)
    _say(comm, _HELP)
    with cli.recorded(args.record, model, comm):
        _talk(comm, conversation)


def _talk(comm: Comm, conversation: Conversation) -> None:
    lines = _Lines(comm)
    while (line := lines.read()) is not None and line != "/quit":
        if line == "/reset":
            conversation.reset()
            _say(comm, "The conversation is forgotten.")
        elif line == "/help":
            _say(comm, _HELP)
        elif line:
            conversation.answer(line)


class _Interrupt:
    """Ctrl-C on rank 0: within an answer it stops the answer, on all ranks.

    Attributes:
        is_answering: whether an answer is being generated.
        stops: whether it is to end now; only rank 0 knows.
    """

    def __init__(self) -> None:
        self.is_answering = self.stops = False

    def catch(self) -> None:
        """From here on; before the ranks meet, or the signal would end all of them."""
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.is_answering:
            raise KeyboardInterrupt
        self.stops = True

    @contextmanager
    def answering(self) -> Iterator[None]:
        self.is_answering, self.stops = True, False
        try:
            yield
        finally:
            self.is_answering = False


class _Lines:
    """What the user types: with line editing and a history where it is a terminal."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._is_terminal = comm.rank == 0 and sys.stdin.isatty()
        self._was_interrupted = False
        if self._is_terminal:
            file = cache_folder() / "chat_history"
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(_HISTORY_LINES)
            if file.exists():
                readline.read_history_file(file)
            atexit.register(readline.write_history_file, file)

    def read(self) -> str | None:
        """The user's next line, read by rank 0 and known to all; None at the end."""
        line = None
        note_progress("waiting")  # for the user: without a limit
        if self._comm.rank == 0:
            line = self._read()
        line = broadcast_object(self._comm, line)
        return None if line is None else line.strip()

    def _read(self) -> str | None:
        try:
            if self._is_terminal:
                line = input(">> ")
            else:
                print(">> ", end="", flush=True)
                line = sys.stdin.readline()
                if not line:
                    return None
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            print(f"(what you type must be UTF-8: {error})")
            return ""
        except KeyboardInterrupt:
            print()
            if self._was_interrupted:
                return None
            print("(once more, or /quit, to leave)")
            self._was_interrupted = True
            return ""
        self._was_interrupted = False
        return line


class Conversation:
    """The messages so far, and a KV cache that holds a beginning of them."""

    def __init__(
        self,
        args: argparse.Namespace,
        comm: Comm,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        interrupt: _Interrupt,
    ) -> None:
        self._args, self._comm, self._interrupt = args, comm, interrupt
        self._model, self._tokenizer = model, tokenizer
        self._rank_sampler = cli.rank_sampler(args, tokenizer)
        self._end = min(tokenizer.eos_token_ids)
        self._options = cli.cache_options(args)
        self._max_kv_size = self._options.pop("max_kv_size")
        self._most_tokens = cli.most_tokens(model)
        self._messages: list[dict[str, str]] = []
        self._cache: list[Any] = []
        self._cached: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self._messages = []
        if self._args.system_prompt is not None:
            self._messages.append(
                {"role": "system", "content": self._args.system_prompt}
            )
        self._forget_cache()

    def answer(self, text: str) -> None:
        """Print the model's answer to the user's text, as it comes.

        A conversation that is longer than the model's context is not answered, and
        goes on without that text.
        """
        self._messages.append({"role": "user", "content": text})
        prompt = self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True
        )
        if self._most_tokens is not None and len(prompt) > self._most_tokens:
            self._messages.pop()
            _say(
                self._comm,
                f"(the conversation must fit the model's context of "
                f"{self._most_tokens} tokens; with this it has {len(prompt)}. Say "
                "less, or begin anew with /reset)",
            )
            return
        reply, last = "", None
        responses = stream_generate(
            self._model,
            self._tokenizer,
            self._uncached(prompt),
            max_tokens=self._args.max_tokens,
            sampler=self._sample,
            prompt_cache=self._cache,
            prompt_progress_callback=note_prefill,
            **self._options,
        )
        with self._interrupt.answering():
            for last in note_decode(responses):
                _say(self._comm, last.text, end="")
                reply += last.text
                self._cached.append(last.token)
        assert last is not None
        _say(self._comm)
        _say(
            self._comm,
            f"[{last.generation_tokens} tokens, {last.generation_tps:.1f} "
            f"tokens-per-sec, peak {last.peak_memory:.2f} GB]",
        )
        self._messages.append({"role": "assistant", "content": reply})

    def _sample(self, logprobs: mx.array) -> mx.array:
        """Rank 0's token on every rank; the one that ends a text after Ctrl-C."""
        token = self._rank_sampler(logprobs)
        if self._interrupt.stops:
            token = mx.full(token.shape, self._end, token.dtype)
        return self._comm.broadcast(token)

    def _uncached(self, prompt: list[int]) -> list[int]:
        """What of `prompt` the cache lacks, after it is cut to what they share.

        A template may render earlier messages anew (thoughts left out, say), so that
        the cache need not be a beginning of the prompt.
        """
        offset = _cache_length(self._cache)
        known = self._cached[:offset] if offset is not None else []
        shared = min(common_prefix_len(known, prompt), len(prompt) - 1)
        surplus = (offset or 0) - shared
        if offset is None or (surplus and not can_trim_prompt_cache(self._cache)):
            self._forget_cache()
            shared = 0
        elif surplus:
            trim_prompt_cache(self._cache, surplus)
        self._cached = list(prompt)
        return prompt[shared:]

    def _forget_cache(self) -> None:
        self._cache = make_prompt_cache(self._model, self._max_kv_size)
        self._cached = []


def _cache_length(cache: list[Any]) -> int | None:
    """Tokens that a KV cache holds; None where it does not say so."""
    lengths = {getattr(layer, "offset", None) for layer in cache}
    return lengths.pop() if len(lengths) == 1 else None


def _say(comm: Comm, text: str = "", end: str = "\n") -> None:
    if comm.rank == 0:
        print(text, end=end, flush=True)


if __name__ == "__main__":
    main()
