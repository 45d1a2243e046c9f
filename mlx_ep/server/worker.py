"""What one rank does in a step: it follows rank 0's decision, and decodes.

Ranks with attention of their own (`data`) hold the sequences that they own; every rank
knows of all, since a pass is one of all ranks, with as many tokens of each as all know.
Otherwise every rank holds all sequences, and rank 0 draws the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.comm import Comm, note_step
from mlx_ep.server.batch import DecodeBatch, merge, prefill
from mlx_ep.server.kv import begin_with, kept_prefix, leaf_caches
from mlx_ep.server.messages import Heard
from mlx_ep.server.prefix_cache import PrefixCache
from mlx_ep.server.requests import FinishReason, Request
from mlx_ep.server.sampling import Drawn, SequenceSampler, draw_all
from mlx_ep.server.scheduler import Decision, Enter
from mlx_ep.server.sizes import KvSizes
from mlx_ep.types import TokenCounts

# A prompt that brought so many tokens is kept for others that begin with it, before its
# answer ends.
KEEP_PROMPT = 64


@dataclass
class Running:
    """A sequence that has a place.

    Attributes:
        tokens: of the prompt and what was drawn.
        done: of the prompt's tokens that the KV cache holds.
        caches: while the prompt is processed, on the ranks that hold it.
        sampler: on the rank that draws its tokens.
    """

    request: Request
    owner: int
    tokens: list[int]
    done: int
    caches: list[Any] | None = None
    sampler: SequenceSampler | None = None
    cached: int = 0

    @property
    def left(self) -> int:
        """Tokens of the prompt before the first can be drawn."""
        return max(0, len(self.request.tokens) - 1 - self.done)


@dataclass
class Ended:
    """A sequence that has ended in this step."""

    place: int
    reason: FinishReason


@dataclass
class Worker:
    """One rank's sequences.

    Args:
        own_attention: whether each rank holds sequences of its own.
        prefixes: of every rank that holds sequences of its own, of which this rank
            keeps its own up to date (rank 0 all of them); one where all hold the same.
        make_sampler: for a request whose tokens this rank draws.

    Attributes:
        drawn: in the last step, by place.
    """

    model: nn.Module
    comm: Comm
    sizes: KvSizes
    own_attention: bool
    prefixes: list[PrefixCache]
    make_sampler: Callable[[Request], SequenceSampler]
    running: dict[int, Running] = field(default_factory=dict)
    drawn: dict[int, Drawn] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batch = DecodeBatch(self.model)

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

    def hear(self, heard: Sequence[Heard]) -> list[Ended]:
        """Take the tokens that were drawn in the last step, on whatever rank."""
        ended = []
        for rank, told in enumerate(heard):
            if rank and not self.own_attention:
                break  # rank 0 alone draws
            for place, (token, reason) in told.tokens.items():
                sequence = self.running.get(place)
                assert sequence is not None, f"a token for the free place {place}"
                sequence.tokens.append(token)
                note_step(place, token)
                if reason is not None:
                    ended.append(Ended(place, reason))
        for end in ended:
            if end.reason != "error":
                # The last token has not been in the model.
                sequence = self.running[end.place]
                self._keep(end.place, sequence, len(sequence.tokens) - 1)
        self._free([end.place for end in ended])
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
        self.drawn = self._decode()

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
        sequence = Running(
            request, enter.owner, list(request.tokens), cached, cached=cached
        )
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

    def _keep(self, place: int, sequence: Running, num_tokens: int) -> None:
        """Keep the KV cache of a sequence for requests that begin with its tokens."""
        if not self._knows(sequence.owner):
            return
        prefixes = self.prefixes[sequence.owner]
        num_bytes = self.sizes.held(num_tokens)
        if not prefixes.has_room_for(num_bytes):
            return
        content = None
        if self._is_here(sequence):
            caches = sequence.caches or self._batch.extract(place)
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
                    self._keep(place, sequence, sequence.done)

    def _part(self, place: int, count: int) -> list[int]:
        sequence = self.running[place]
        return sequence.tokens[sequence.done : sequence.done + count]

    def _decode(self) -> dict[int, Drawn]:
        """One token of every sequence whose prompt is processed."""
        ready = [sequence for sequence in self.running.values() if not sequence.left]
        if not ready:
            return {}
        counts = [0] * self.comm.size
        for sequence in ready:
            counts[sequence.owner] += 1
        self._agree(counts)
        rows = [self.running[place] for place in self._batch.places]
        if not rows:
            self._serve()
            return {}
        logits = self._batch.logits([sequence.tokens[-1] for sequence in rows])
        samplers = [row.sampler for row in rows if row.sampler is not None]
        if not samplers:
            # sync: rank 0 draws; this rank takes part in what its logits need.
            mx.eval(logits)
            return {}
        drawn = draw_all(logits, samplers, [row.tokens for row in rows])
        return dict(zip(self._batch.places, drawn, strict=True))

    def _agree(self, counts: Sequence[int]) -> None:
        """Tell the layers how many tokens each rank has in the pass to come."""
        if self.own_attention:
            tokens = TokenCounts(tuple(counts))
            self.model.expert_parallel.group.step.tokens = tokens

    def _serve(self) -> None:
        """Run this rank's experts for the tokens of the others."""
        for block in self.model.expert_parallel.blocks:
            block.serve()


def _padded(chunks: Sequence[tuple[int, int]]) -> int:
    return len(chunks) * max((count for _, count in chunks), default=0)
