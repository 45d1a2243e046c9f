"""What one rank does in a step: it follows rank 0's decision, and decodes.

With `look_ahead` the pass over the tokens of the last step begins before anybody has
read them, so that what the host does in between costs no time: taking tokens, telling
clients, building the next graph. It comes too early for those that end or are
cancelled, whose row is for nothing, and for those that enter, whose first pass is the
next one. Without it, the pass begins when all that is known.

Ranks with attention of their own (`data`) hold the sequences that they own; every rank
knows of all, since a pass is one of all ranks, with as many tokens of each as all know.
Otherwise every rank holds all sequences, and rank 0 draws the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Int32
from mlx_lm.generate import StopSequences
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.comm import Comm, note_step
from mlx_ep.loading.caches import leaf_caches
from mlx_ep.server.batch import DecodeBatch, merge, prefill
from mlx_ep.server.kv import begin_with, kept_prefix
from mlx_ep.server.messages import Details, DrawnHere, Heard
from mlx_ep.server.prefix_cache import KEEP_PROMPT, PrefixCache
from mlx_ep.server.requests import FinishReason, Request
from mlx_ep.server.sampling import Drawn, SequenceSampler, draw_all, read_details
from mlx_ep.server.scheduler import Decision, Enter
from mlx_ep.server.sharing import Sharing
from mlx_ep.server.sizes import KvSizes
from mlx_ep.types import TokenCounts


@dataclass(eq=False)
class Running:
    """A sequence that has a place.

    Attributes:
        tokens: of the prompt and what was drawn.
        done: of the prompt's tokens that the KV cache holds.
        stops: what ends it beside its length; every rank looks.
        caches: while the prompt is processed, on the ranks that hold it.
        sampler: on the rank that draws its tokens.
        is_drawing: whether its next token is being drawn, on whatever rank.
        cached: tokens of the prompt that came from the prefix cache.
    """

    place: int
    request: Request
    owner: int
    tokens: list[int]
    done: int
    stops: StopSequences.Matcher
    caches: list[Any] | None = None
    sampler: SequenceSampler | None = None
    is_drawing: bool = False
    cached: int = 0

    @property
    def left(self) -> int:
        """Tokens of the prompt before the first can be drawn."""
        return max(0, len(self.request.tokens) - 1 - self.done)

    @property
    def num_drawn(self) -> int:
        """Tokens of the answer, with the one that is being drawn."""
        return len(self.tokens) - len(self.request.tokens) + self.is_drawing

    def take(self, token: int) -> FinishReason | None:
        """One more token; why the sequence ends with it."""
        self.tokens.append(token)
        self.is_drawing = False
        if self.sampler is not None:
            self.sampler.accept(token)
        if self.stops.advance(token):
            return "stop"
        return "length" if self.num_drawn >= self.request.max_tokens else None


class Ended(NamedTuple):
    """Why a sequence has ended in this step."""

    reason: FinishReason
    message: str = ""


class Pass(NamedTuple):
    """A pass over one more token of every sequence whose prompt is processed.

    Attributes:
        sequences: of all ranks.
        rows: those of this rank, in the order of its batch.
        logits: ``[rows, V]``, not evaluated; None without rows.
    """

    sequences: list[Running]
    rows: list[Running]
    logits: mx.array | None


@dataclass
class Worker:
    """One rank's sequences.

    Args:
        own_attention: whether each rank holds sequences of its own.
        looks_ahead: whether `look_ahead` is called, between `drawn` and `hear`; alike
            on all ranks.
        num_places: sequences at most.
        prefixes: of every rank that holds sequences of its own, of which this rank
            keeps its own up to date (rank 0 all of them); one where all hold the same.
        ends: the model's own end tokens.
        make_sampler: for a request whose tokens this rank draws.
        sharing: which passes are shared that need not be.
        may_share: whether any is, as none is while rows of tokens are recorded.
    """

    model: nn.Module
    comm: Comm
    sizes: KvSizes
    own_attention: bool
    looks_ahead: bool
    num_places: int
    prefixes: list[PrefixCache]
    ends: Sequence[int]
    make_sampler: Callable[[Request], SequenceSampler]
    sharing: Sharing = field(default_factory=Sharing)
    may_share: bool = True
    running: dict[int, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batch = DecodeBatch(self.model)
        self._pass = Pass([], [], None)
        self._rows: list[Running] = []  # of what is being drawn on this rank
        self._drawn: Drawn | None = None

    @property
    def kv_bytes(self) -> int:
        """Of the KV caches of sequences, without those of the prefix cache."""
        single = sum(
            cache.nbytes
            for sequence in self.running.values()
            for cache in leaf_caches(sequence.caches or ())
        )
        return single + self._batch.num_bytes

    @property
    def num_active(self) -> int:
        """Sequences on this rank."""
        return sum(map(self._is_here, self.running.values()))

    @property
    def is_apart(self) -> bool:
        """Whether ranks hold sequences of their own, and need not exchange anything.

        A rank without tokens in a pass has nothing to do in it then, unless it is
        shared.
        """
        is_alone = bool(self.model.expert_parallel.group.may_be_apart)
        return self.own_attention and self.comm.size > 1 and is_alone

    # One step, in this order ----------------------------------------------------------

    def drawn(self) -> DrawnHere:
        """The tokens that are being drawn here, for `StepExchange`."""
        if self._drawn is None:
            return DrawnHere()
        return DrawnHere([row.place for row in self._rows], self._drawn.tokens)

    def details(self) -> Details:
        """What there is to say of the tokens that are being drawn here."""
        found: Details = {}
        for row, details in (self._drawn.details if self._drawn else {}).items():
            logprob, top = read_details(details)
            found[self._rows[row].place] = logprob, top, ""
        return found

    def problems(self) -> Details:
        """Of sequences on this rank that cannot go on."""
        return {
            place: (None, (), sequence.sampler.problem)
            for place, sequence in self.running.items()
            if sequence.sampler is not None and sequence.sampler.problem
        }

    def look_ahead(self, words: Callable[[], Int32[mx.array, " places"]]) -> None:
        """Begin the pass over the tokens that were drawn.

        Args:
            words: gives `StepExchange.words` of the rank that drew for this one.
        """
        self._begin_pass(words)

    def _begin_pass(
        self, words: Callable[[], Int32[mx.array, " places"]] | None = None
    ) -> None:
        """The pass over one more token of all that can; None: the tokens are known."""
        ready = [s for s in self.running.values() if not s.left]
        self._pass = Pass([], [], None)
        if all(s.num_drawn >= s.request.max_tokens for s in ready):
            return  # for nobody
        counts = [0] * self.comm.size
        for sequence in ready:
            counts[sequence.owner] += 1
        self._agree(counts)
        rows = [self.running[place] for place in self._batch.places]
        if not rows:
            self._pass = Pass(ready, [], None)
            self._serve()
            return
        if words is not None and self._drawn is not None and rows == self._rows:
            tokens = self._drawn.tokens  # on the rank that draws, as a rule
        else:
            tokens = mx.array([row.tokens[-1] for row in rows], mx.int32)
            if words is not None:  # but those of their first pass
                drawn = words()[mx.array(self._batch.places)] - 1
                tokens = mx.where(mx.array([s.is_drawing for s in rows]), drawn, tokens)
        logits = self._batch.logits(tokens)
        mx.async_eval(logits)
        self._pass = Pass(ready, rows, logits)

    def hear(self, heard: Sequence[Heard], problems: Details) -> dict[int, Ended]:
        """Take the tokens that were drawn in the last step, on whatever rank.

        Args:
            problems: of all ranks; their sequences end without a token.

        Returns:
            By place, the sequences that have ended.
        """
        ended = {
            place: Ended("error", text) for place, (_, _, text) in problems.items()
        }
        for told in heard if self.own_attention else heard[:1]:
            for place, token in told.tokens.items():
                if place in ended:
                    continue
                sequence = self.running[place]
                note_step(place, token)
                if reason := sequence.take(token):
                    ended[place] = Ended(reason)
                    # The last token may not have been in the model.
                    self._keep(sequence, len(sequence.tokens) - 1)
        self._free(list(ended))
        return ended

    def step(self, decision: Decision, begun: dict[int, list[Any]]) -> None:
        """Follow a decision, then draw a token for every sequence that can have one.

        Args:
            begun: by place, what `begin` gave.
        """
        self._free(decision.cancel)
        for enter in decision.enter:
            self._enter(enter, begun.get(enter.place))
        if decision.prefill:
            self._prefill(decision.prefill)
        if not self.looks_ahead:
            self._begin_pass()
        self._draw()

    def begin(self, decision: Decision) -> dict[int, list[Any]]:
        """The caches that entering sequences find; to be called before `hear`.

        What ends in the same step may throw out of the prefix cache what rank 0 found.
        """
        begun = {}
        for place, owner, _, hit in decision.enter:
            if hit is not None and (self._knows(owner)):
                content = self.prefixes[owner].use(hit.entry)
                if content is not None:
                    begun[place] = begin_with(content, hit.num_tokens)
        return begun

    # The sequences --------------------------------------------------------------------

    def _is_here(self, sequence: Running) -> bool:
        return not self.own_attention or sequence.owner == self.comm.rank

    def _knows(self, owner: int) -> bool:
        """Whether this rank keeps account of an owner's prefix cache."""
        return not self.own_attention or self.comm.rank in (0, owner)

    def _draws(self, sequence: Running) -> bool:
        return self.comm.rank == (sequence.owner if self.own_attention else 0)

    def _enter(self, enter: Enter, caches: list[Any] | None) -> None:
        request, hit = enter.request, enter.hit
        cached = hit.num_tokens if hit else 0
        stops = StopSequences([*((end,) for end in self.ends), *request.stop])
        sequence = Running(
            enter.place, request, enter.owner, list(request.tokens), cached,
            stops.matcher(), cached=cached,
        )  # fmt: skip
        self.running[enter.place] = sequence
        if self._draws(sequence):
            sequence.sampler = self.make_sampler(request)
        if self._is_here(sequence):
            sequence.caches = caches or make_prompt_cache(self.model)
            if not sequence.left:
                self._join([enter.place], merge([sequence.caches]))

    def _free(self, places: Sequence[int]) -> None:
        for place in places:  # one that was to be cancelled may have ended
            self.running.pop(place, None)
        if places:
            self._batch.leave(places)

    def _join(self, places: Sequence[int], caches: list[Any]) -> None:
        self._batch.join(places, caches)
        for place in places:
            self.running[place].caches = None

    def _keep(self, sequence: Running, num_tokens: int) -> None:
        """Keep the KV cache of a sequence for requests that begin with its tokens."""
        if not self._knows(sequence.owner):
            return
        prefixes = self.prefixes[sequence.owner]
        num_bytes = self.sizes.held(num_tokens)
        if not prefixes.has_room_for(num_bytes):
            return
        content = None
        if self._is_here(sequence):
            caches = sequence.caches or self._batch.extract(sequence.place)
            content = kept_prefix(caches, num_tokens)
        prefixes.put(sequence.tokens[:num_tokens], num_bytes, content)

    # The passes -----------------------------------------------------------------------

    def _prefill(self, prefills: dict[int, list[tuple[int, int]]]) -> None:
        """One pass over parts of prompts, of every rank that has some."""
        mine = prefills.get(self.comm.rank if self.own_attention else 0, [])
        owners = range(self.comm.size)
        self._agree([_padded(prefills.get(owner, [])) for owner in owners])
        merged = None
        if mine:
            parts = [self._part(place, count) for place, count in mine]
            caches = [self.running[place].caches or [] for place, _ in mine]
            merged = prefill(self.model, parts, caches)
        else:
            self._serve()
        for chunks in prefills.values():
            for place, count in chunks:
                self.running[place].done += count
        if merged is not None:
            # All of a group are at their end.
            self._join([place for place, _ in mine], merged)
        elif mine and not self.running[mine[0][0]].left:
            place = mine[0][0]
            self._join([place], merge([self.running[place].caches or []]))
        for chunks in prefills.values():
            for place, _ in chunks:
                sequence = self.running[place]
                new = sequence.done - sequence.cached
                if not sequence.left and new >= KEEP_PROMPT:
                    self._keep(sequence, sequence.done)

    def _part(self, place: int, count: int) -> list[int]:
        sequence = self.running[place]
        return sequence.tokens[sequence.done : sequence.done + count]

    def _draw(self) -> None:
        """Tokens of those sequences of the last pass that still run."""
        sequences, rows, logits = self._pass
        for sequence in filter(self._runs, sequences):
            sequence.is_drawing = True
        keep = [row for row, sequence in enumerate(rows) if self._runs(sequence)]
        self._rows, self._drawn = [rows[row] for row in keep], None
        samplers = [s.sampler for s in self._rows if s.sampler is not None]
        if not samplers or logits is None:
            return
        if len(keep) < len(rows):
            logits = logits[mx.array(keep)]
        self._drawn = draw_all(logits, samplers, [row.tokens for row in self._rows])

    def _runs(self, sequence: Running) -> bool:
        """Whether a sequence of the last pass has its place still."""
        return self.running.get(sequence.place) is sequence

    def _agree(self, counts: Sequence[int]) -> None:
        """Tell the layers how many tokens each rank has in the pass to come."""
        if self.own_attention:
            step = self.model.expert_parallel.group.step
            step.tokens = TokenCounts(tuple(counts))
            step.is_shared = self.may_share and self.sharing.shares(counts)

    def _serve(self) -> None:
        """Run this rank's experts for the tokens of the others."""
        self.model.expert_parallel.serve()


def _padded(chunks: Sequence[tuple[int, int]]) -> int:
    return len(chunks) * max((count for _, count in chunks), default=0)
