"""Speculative decoding of a batch: a draft proposes for all, one pass checks.

A turn, with n proposals a sequence (n falls where no sequence has room for as many):

    draft    n passes [B, 1]       d1 ... dn, each sequence's next tokens
    model    one pass [B, n + 1]   last, d1 ... dn  ->  t1 ... tn+1
    keep     t1 ... ta+1           a: as many leading d as equal the model's t

Every kept token is the model's own, drawn from the logits behind kept tokens: under
greedy decoding the text is that without a draft. Sampling keeps mlx-lm's rule too:
a proposal stays while the token that the model draws is the same.

The model's caches hold what is known but the last token, the draft's one less: it may
not have seen its own last proposal, so that it is always given the last two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, UInt32
from mlx_lm.generate import generation_stream

from mlx_ep.generate.row_cache import join, keep_rows, rewind, row_caches
from mlx_ep.types import Sampler, to_host

Share = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Drafting:
    """How a batch is drafted for.

    Attributes:
        model: the draft, whole on this rank; it has the model's tokens.
        num_tokens: that it proposes at a time for each sequence, at most.
        samplers: by the model's sampler of a sequence, the draft's.
        share: makes the proposals of all ranks that run the same sequences alike.
    """

    model: nn.Module
    num_tokens: int
    samplers: Mapping[Sampler, Sampler]
    share: Share


class DraftedToken(NamedTuple):
    """One more token of a sequence.

    Attributes:
        uid: of the sequence.
        token: its number.
        finish_reason: ``stop`` or ``length`` with its last token, else None.
        num_drafted: with its last token: proposals for the sequence that it had room
            for.
        num_accepted: with its last token: those of them that it took.
    """

    uid: int
    token: int
    finish_reason: str | None
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass
class _Sequence:
    uid: int
    prompt: list[int]
    room: int  # tokens that it may still get
    sampler: Sampler
    last: tuple[int, int] = (0, 0)
    length: int = 0  # tokens in the model's caches
    num_drafted: int = 0
    num_accepted: int = 0


class SpeculativeGenerator:
    """Stands for mlx-lm's BatchGenerator where there is a draft.

    Args:
        model: what is called with tokens ``[B, N]`` and a list of caches.
        stop_tokens: sequences of one token each; a sequence ends with any of them.
        drafting: the draft.
        completion_batch_size: sequences that run at once.
        prefill_batch_size: prompts that are processed at once.
        prefill_step_size: tokens of each prompt that are processed at once.
        max_kv_size: has no effect, as in mlx-lm with a draft.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_tokens: Sequence[Sequence[int]],
        drafting: Drafting,
        completion_batch_size: int = 32,
        prefill_batch_size: int = 8,
        prefill_step_size: int = 2048,
        max_kv_size: int | None = None,
    ) -> None:
        self._model, self._drafting = model, drafting
        self._stop = {token for (token,) in stop_tokens}
        self._batch_size = completion_batch_size
        self._prefill_batch_size = min(prefill_batch_size, completion_batch_size)
        self._step = prefill_step_size
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._caches: list[Any] = []
        self._draft_caches: list[Any] = []

    def insert(
        self,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        samplers: Sequence[Sampler],
    ) -> list[int]:
        """Take prompts to be answered; the numbers of their sequences."""
        first = len(self._waiting)
        uids = list(range(first, first + len(prompts)))
        rows = zip(uids, prompts, max_tokens, samplers, strict=True)
        self._waiting.extend(_Sequence(*row) for row in rows)
        return uids

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of the caches, those of the draft too."""
        return sum(each.nbytes for each in (*self._caches, *self._draft_caches))

    def close(self) -> None:
        """Forget the caches."""
        self._caches, self._draft_caches = [], []

    def next(self) -> tuple[list[Any], list[DraftedToken]]:
        """Let prompts enter where there is room, then one turn of all sequences.

        Returns:
            An empty list, as BatchGenerator's progress of prompts; and the tokens, of
            each sequence in their order.
        """
        with mx.stream(generation_stream):
            tokens = self._enter()
            return [], tokens + (self._turn() if self._running else [])

    def _enter(self) -> list[DraftedToken]:
        """Process prompts that wait; the first token of each, without a draft."""
        room = self._batch_size - len(self._running)
        count = min(self._prefill_batch_size, room, len(self._waiting))
        if count <= 0:
            return []
        entering = [self._waiting.popleft() for _ in range(count)]
        heads = [each.prompt[:-1] for each in entering]
        caches = row_caches(self._model, count)
        draft_caches = row_caches(self._drafting.model, count)
        _process(self._model, caches, heads, self._step)
        _process(self._drafting.model, draft_caches, heads, self._step)
        inputs = mx.array([each.prompt[-1:] for each in entering], mx.uint32)
        samplers = [each.sampler for each in entering]
        drawn = _draw(self._model(inputs, cache=caches), samplers)
        # sync: which of them have ended already.
        found = to_host(drawn).tolist()  # on host
        for each in entering:
            each.last, each.length = (0, each.prompt[-1]), len(each.prompt)
        tokens = self._take(entering, found)
        kept = [i for i, each in enumerate(entering) if each.room]
        if not kept:
            return tokens
        keep_rows(caches, kept)
        keep_rows(draft_caches, kept)
        if self._running:
            join(self._caches, caches)
            join(self._draft_caches, draft_caches)
        else:
            self._caches, self._draft_caches = caches, draft_caches
        self._running += [entering[i] for i in kept]
        return tokens

    def _turn(self) -> list[DraftedToken]:
        rows = self._running
        most_room = max(each.room for each in rows)
        count = min(self._drafting.num_tokens, most_room - 1)
        proposals = self._propose(count)
        if count:
            proposals = self._drafting.share(proposals)
        last = mx.array([each.last[1:] for each in rows], mx.uint32)
        logits = self._model(mx.concatenate([last, proposals], 1), cache=self._caches)
        drawn = _draw(logits, [each.sampler for each in rows])
        # sync: how many proposals of each sequence stay.
        both = to_host(mx.concatenate([proposals, drawn], 1)).tolist()  # on host
        kept_tokens = []
        for each, values in zip(rows, both, strict=True):
            drafts, found = values[:count], values[count:]
            accepted = 0
            while accepted < count and drafts[accepted] == found[accepted]:
                accepted += 1
            kept = self._until_end(each, found[: accepted + 1])
            each.num_drafted += min(count, each.room)
            each.num_accepted += min(accepted, len(kept))
            each.length += len(kept)
            kept_tokens.append(kept)
        tokens = self._take(rows, kept_tokens)
        self._leave()
        return tokens

    def _propose(self, count: int) -> UInt32[mx.array, "B N"]:
        """The draft's next tokens of every sequence; nothing is evaluated."""
        rows, drafting = self._running, self._drafting
        proposed = [mx.zeros((len(rows), 0), mx.uint32)]
        samplers = [drafting.samplers[each.sampler] for each in rows]
        inputs = mx.array([each.last for each in rows], mx.uint32)
        for _ in range(count):
            logits = drafting.model(inputs, cache=self._draft_caches)
            inputs = _draw(logits[:, -1:], samplers)
            proposed.append(inputs)
        return mx.concatenate(proposed, 1)

    def _until_end(self, sequence: _Sequence, tokens: list[int]) -> list[int]:
        """Tokens up to the one that ends the sequence."""
        tokens = tokens[: sequence.room]
        ends = [index for index, token in enumerate(tokens) if token in self._stop]
        return tokens[: ends[0] + 1] if ends else tokens

    def _take(
        self, sequences: Sequence[_Sequence], tokens: Sequence[list[int]]
    ) -> list[DraftedToken]:
        """Give each sequence its tokens; `room` is 0 where it has ended."""
        taken = []
        for each, its in zip(sequences, tokens, strict=True):
            each.last = (*each.last, *its)[-2], its[-1]
            each.room -= len(its)
            reason = None if each.room else "length"
            if its[-1] in self._stop:
                each.room, reason = 0, "stop"
            taken += [DraftedToken(each.uid, token, None) for token in its[:-1]]
            counts = (each.num_drafted, each.num_accepted) if reason else ()
            taken.append(DraftedToken(each.uid, its[-1], reason, *counts))
        return taken

    def _leave(self) -> None:
        """Take back what was not kept; ended sequences make room."""
        rewind(self._caches, [each.length for each in self._running])
        rewind(self._draft_caches, [each.length - 1 for each in self._running])
        kept = [index for index, each in enumerate(self._running) if each.room]
        if len(kept) == len(self._running):
            return
        self._running = [self._running[index] for index in kept]
        if not kept:
            self.close()
            return
        keep_rows(self._caches, kept)
        keep_rows(self._draft_caches, kept)


def _process(
    model: Any, caches: list[Any], prompts: Sequence[list[int]], step: int
) -> None:
    """Fill caches with prompts; what pads the shorter ones is taken back."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    tokens = mx.array([p + [0] * (longest - len(p)) for p in prompts], mx.uint32)
    for start in range(0, longest, step):
        model(tokens[:, start : start + step], cache=caches)
        # sync: a step at a time, or all of them would be held at once.
        mx.eval([cache.state for cache in caches])
        mx.clear_cache()
    rewind(caches, lengths)


def _draw(
    logits: Float[mx.array, "B N V"], samplers: Sequence[Sampler]
) -> UInt32[mx.array, "B N"]:
    """A token behind each position, by each sequence's sampler.

    Sequences with one sampler are drawn together: a sampler may be a collective.
    """
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    batch, count, width = logits.shape
    groups: dict[Sampler, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler, []).append(row)
    drawn, order = [], []
    for sampler, rows in groups.items():
        some = logprobs if len(rows) == batch else logprobs[mx.array(rows)]
        tokens = sampler(some.reshape(-1, width)).astype(mx.uint32)
        drawn.append(tokens.reshape(len(rows), count))
        order += rows
    if len(drawn) == 1:
        return drawn[0]
    back = sorted(range(batch), key=order.__getitem__)
    return mx.concatenate(drawn)[mx.array(back)]
