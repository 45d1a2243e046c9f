"""A model whose steps run as two micro-batches in turn (`--overlap two`).

A step is cut in two, each part is a forward pass of the model's own code, and where a
MoE layer has started an exchange the other part goes on (`mlx_ep.moe.overlap`). Nothing
of a model's code has to be known.

Decode is cut between sequences, at half of them, each half with caches of its own
(`HalvedCache`). A prompt is cut between tokens, in the middle: the second half attends
to the first one through the same caches, as in a prompt that is processed in chunks.
Several prompts are cut at the same column, so that both sides have the same number of
tokens to within one for each prompt, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.models.blocks import BlockState
from mlx_ep.models.halved_cache import HalvedCache, are_of_batch, num_sequences
from mlx_ep.models.second_half import has_second_half, second_half
from mlx_ep.moe import ExpertGroup, OverlapMode
from mlx_ep.types import TokenCounts, to_host

# Below, a part of a prompt has too few tokens to hide anything.
LEAST_PROMPT = 16

StepKind = Literal["decode", "prompt"]


class StepCut(NamedTuple):
    """Where a step ``[B, L]`` is cut.

    Attributes:
        kind: ``decode`` between sequences, ``prompt`` between tokens.
        first: sequences, or tokens of each, of the first micro-batch; 0: it is not cut.
        tokens: of the micro-batches.
    """

    kind: StepKind
    first: int
    tokens: tuple[int, int]


def cut_step(num_sequences: int, length: int) -> StepCut:
    """Where to cut a step: decode at half of the sequences, a prompt in its middle.

    >>> cut_step(5, 1)
    StepCut(kind='decode', first=2, tokens=(2, 3))
    """
    total = num_sequences * length
    if length == 1:
        first = num_sequences // 2
        return StepCut("decode", first, (first, total - first))
    first = length // 2 if length >= LEAST_PROMPT else 0
    tokens = num_sequences * first
    return StepCut("prompt", first, (tokens, total - tokens))


# What a step is run as, by its kind and its tokens (of the rank that has most).
Choose = Callable[[StepKind, int], OverlapMode]
# A pass of this rank; without an output where it has no tokens of its own.
_Build = Callable[[], mx.array | None]


class TwoBatch:
    """What stands between a caller and a model's ``__call__``.

    Where a step cannot be cut (one sequence decodes, the model is called with more than
    tokens and caches, or a prompt's caches are none that `second_half` knows, such as
    quantized ones), it runs as with ``--overlap single``.

    Args:
        choose: the mode of a step; alike on all ranks.
    """

    def __init__(
        self,
        model_class: type[nn.Module],
        group: ExpertGroup,
        blocks: Sequence[BlockState],
        choose: Choose,
    ) -> None:
        self.choose = choose
        self._model_class, self._group, self._blocks = model_class, group, blocks
        self._num_timed = 0

    def __call__(
        self, model: nn.Module, tokens: mx.array, caches: list[Any] | None, rest: Any
    ) -> mx.array:
        """A pass of tokens ``[B, L]``; its logits ``[B, L, V]``."""
        can_cut = caches is not None and not rest and tokens.ndim == 2
        cut = cut_step(*tokens.shape) if can_cut else _uncut("prompt", tokens.size)
        if cut.first or cut.kind == "decode":
            can = _halve if cut.kind == "decode" else _can_follow
            if not can(caches or []):
                cut = _uncut(cut.kind, tokens.size)
        mode, counts = self._agree(cut)
        if mode != "two":
            whole = caches if caches is None else _whole(caches)
            with self._group.overlap.passing(mode), self._tokens(counts):
                return self._pass(model, tokens, whole, rest)
        parts = _parts(tokens, caches or [], cut)
        builds: list[_Build] = [
            self._serve if part is None else partial(self._pass, model, *part, {})
            for part in parts
        ]
        outputs = [output for output in self._run(builds, counts) if output is not None]
        axis = 0 if cut.kind == "decode" else 1
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis)

    def serve(self) -> None:
        """Run this rank's experts in a step of the others, with no tokens of its own.

        Raises:
            ValueError: as `BlockState.serve`.
        """
        mode, counts = self._agree(_uncut("decode", 0))
        if mode == "two":
            self._run([self._serve, self._serve], counts)
            return
        with self._group.overlap.passing(mode), self._tokens(counts):
            self._serve()

    def _serve(self) -> None:
        for block in self._blocks:
            block.serve()

    def _pass(
        self, model: nn.Module, tokens: mx.array, caches: list[Any] | None, rest: Any
    ) -> mx.array:
        logits: mx.array = self._model_class.__call__(
            model, tokens, cache=caches, **rest
        )
        return logits

    def _agree(self, cut: StepCut) -> tuple[OverlapMode, _Counts]:
        """The mode of a step, and the tokens of each micro-batch on every rank."""
        group = self._group
        if not group.strategy.is_sharded:
            mode = self.choose(cut.kind, sum(cut.tokens))
            return ("single" if mode == "two" and not cut.first else mode), None
        mine = mx.array([[cut.kind == "prompt", *cut.tokens]], mx.int32)
        # sync: the shapes of the step's exchanges depend on it.
        ranks = to_host(group.counted.all_gather(mine))
        first, second = (TokenCounts(tuple(c.tolist())) for c in ranks.T[1:])  # on host
        kind: StepKind = "prompt" if ranks[:, 0].any() else "decode"
        mode = self.choose(kind, int(ranks[:, 1:].sum(axis=1).max()))
        if mode == "two" and not first.largest:
            mode = "single"
        return mode, (first, second)

    @contextmanager
    def _tokens(self, counts: _Counts) -> Iterator[None]:
        """What is built has the ranks' tokens of the whole step."""
        step, before = self._group.step, self._group.step.tokens
        if counts is not None:
            both = zip(*(c.per_rank for c in counts), strict=True)
            step.tokens = TokenCounts(tuple(map(sum, both)))
        try:
            yield
        finally:
            step.tokens = before

    def _run(self, builds: Sequence[_Build], counts: _Counts) -> list[mx.array | None]:
        """Both micro-batches in turn; where stages are timed, one by one every second
        time."""
        group, step = self._group, self._group.step
        is_timed = group.timings.enabled
        self._num_timed += is_timed
        tokens = counts or (step.tokens, step.tokens)
        # What is of one pass and not of both: tokens, the layer, layers so far.
        states = [(each, -1, 0) for each in tokens]
        before, inside = step.tokens, -1

        def enter(part: int) -> None:
            nonlocal inside
            if inside >= 0:
                states[inside] = (step.tokens, step.layer, step.calls)
            step.tokens, step.layer, step.calls = states[part]
            inside = part

        try:
            if is_timed and self._num_timed % 2:
                outputs = []
                for part, build in enumerate(builds):
                    enter(part)
                    outputs.append(build())
                return outputs
            return group.overlap.in_turn(builds, enter, is_timed)
        finally:
            step.tokens = before


_Counts = tuple[TokenCounts, TokenCounts] | None


def install_two_batch(model: nn.Module, two_batch: TwoBatch) -> None:
    """Let a model's steps go through `two_batch`; its class is a subclass then."""
    model.two_batch = two_batch
    model.__class__ = _two_batch_class(type(model))


@cache
def _two_batch_class(model_class: type[nn.Module]) -> type[nn.Module]:
    def call(
        self: Any, inputs: mx.array, cache: list[Any] | None = None, **rest: Any
    ) -> mx.array:
        given = {name: value for name, value in rest.items() if value is not None}
        return self.two_batch(self, inputs, cache, given)

    body = {"__call__": call, "__module__": model_class.__module__}
    return type(f"TwoBatch{model_class.__name__}", (model_class,), body)


def _uncut(kind: StepKind, tokens: int) -> StepCut:
    return StepCut(kind, 0, (0, tokens))


def _halve(caches: list[Any]) -> bool:
    """Put caches that can be cut in the place of a batch's, in the caller's list, where
    its next step finds them; False: they are of one sequence.
    """
    if not are_of_batch(caches):
        return False
    for index, each in enumerate(caches):
        if not isinstance(each, HalvedCache):
            caches[index] = HalvedCache(each, num_sequences(each))
    return True


def _can_follow(caches: list[Any]) -> bool:
    """Whether one half of a prompt can follow the other one through these caches."""
    return all(map(has_second_half, _whole(caches)))


def _whole(caches: list[Any]) -> list[Any]:
    """The caches as the model knows them."""
    return [c.whole() if isinstance(c, HalvedCache) else c for c in caches]


def _parts(
    tokens: mx.array, caches: list[Any], cut: StepCut
) -> list[tuple[mx.array, list[Any]] | None]:
    """Tokens and caches of both micro-batches; None: this rank has nothing for it."""
    if not cut.first:
        return [None, (tokens, _whole(caches))]
    if cut.kind == "prompt":
        whole = _whole(caches)
        later = [second_half(each, len(tokens), cut.first) for each in whole]
        return [(tokens[:, : cut.first], whole), (tokens[:, cut.first :], later)]
    halves = [each.cut(cut.first) for each in caches]
    first, second = (list(half) for half in zip(*halves, strict=True))
    return [(tokens[: cut.first], first), (tokens[cut.first :], second)]
