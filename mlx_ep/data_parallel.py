"""Data-parallel attention: every rank runs its own sequences, the experts are shared.

mlx-lm's BatchGenerator runs on each rank as it is, with the rank's own prompts and KV
caches. What differs between ranks (prompts of other lengths, a prefill here and
decoding there, fewer sequences) is how often and with how many tokens it calls the
model. The model it calls is a `LockStep`: every call is one step of all ranks.

    rank 0   prefill 300 tokens | decode 2 | decode 2 | ...      | serve | serve
    rank 1   prefill   8 tokens | decode 1 | prefill 40 | decode | ...   | ...
                                ^ each step begins with one small collective

A step agrees on the ranks' token counts, so that every layer's exchange knows them. A
rank that has nothing left keeps serving its experts, with no tokens, until all are
done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_ep.comm import Comm, gather_objects, note_progress, note_step
from mlx_ep.types import Sampler, TokenCounts, to_host

# What the last token of an answer says where there is a draft.
_DRAFT_COUNTS = ("num_drafted", "num_accepted")


class Answer(NamedTuple):
    """What was generated for one prompt.

    Attributes:
        prompt: its number.
        tokens: without the one that ended it.
        finish_reason: ``stop`` or ``length``.
        num_drafted: tokens that a draft proposed for it; None: there is no draft.
        num_accepted: those of them that it took.
    """

    prompt: int
    tokens: list[int]
    finish_reason: str
    num_drafted: int | None = None
    num_accepted: int | None = None


class BatchResult(NamedTuple):
    """What was generated for all prompts.

    Attributes:
        answers: in the order of the prompts.
        cache_bytes: the most that each rank's KV caches held at once.
    """

    answers: list[Answer]
    cache_bytes: list[int]


@dataclass
class LockStep:
    """A model whose every call is one step of all ranks.

    Stands for the model in mlx-lm's generators: what it does not have itself is the
    model's.

    Attributes:
        on_answer: called on every rank with each answer of any rank, in the same order.
        num_answered: answers of all ranks that every rank knows.
        answers: of this rank, those that the others do not know yet.
        num_finished: sequences that this rank has finished.
    """

    model: nn.Module
    comm: Comm
    on_answer: Callable[[Answer], Any]
    num_answered: int = 0
    answers: list[Answer] = field(default_factory=list)
    num_finished: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """A forward pass of this rank's tokens ``[B, L]``."""
        self._begin(tokens.size, is_done=False)
        return self.model(tokens, cache=cache)

    def serve(self) -> None:
        """Serve this rank's experts until every rank is done."""
        step = 0
        while self._begin(0, is_done=True):
            note_progress("batch", step)
            step += 1
            self.model.expert_parallel.serve()

    def finished(self, answer: Answer) -> None:
        """One more finished sequence; the next step tells the others."""
        self.answers.append(answer)
        self.num_finished += 1

    def _begin(self, num_tokens: int, is_done: bool) -> bool:
        """Agree on a step; False when no rank has anything left."""
        status = mx.array([[num_tokens, not is_done, self.num_finished]], mx.int32)
        # sync: the shapes of the step's exchanges depend on it.
        ranks = to_host(self.comm.all_gather(status))
        note_step(*ranks.flatten().tolist())  # on host; all ranks must have these
        tokens = TokenCounts(tuple(ranks[:, 0].tolist()))  # on host
        self.model.expert_parallel.group.step.tokens = tokens
        if int(ranks[:, 2].sum()) > self.num_answered:
            self._tell()
        return bool(ranks[:, 1].any())

    def _tell(self) -> None:
        """Exchange the answers that ended since the last time."""
        news = gather_objects(self.comm, self.answers)
        self.answers = []
        for answer in (Answer(*values) for rank in news for values in rank):
            self.num_answered += 1
            note_step(answer.prompt, *answer.tokens)
            self.on_answer(answer)


def assign_prompts(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which prompts each rank runs: the longest first, each to the least busy rank.

    Args:
        lengths: tokens of each prompt, and those it may generate.

    Returns:
        Per rank, prompt numbers in ascending order; each prompt on one rank.
    """
    loads = [0] * num_ranks
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[index]
        assigned[rank].append(index)
    return [sorted(indices) for indices in assigned]


def generate_sharded(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    comm: Comm,
    *,
    max_tokens: int | Sequence[int],
    sampler: Sampler | Sequence[Sampler],
    on_answer: Callable[[Answer], Any] | None = None,
    make_generator: Callable[..., Any] = BatchGenerator,
    **options: Any,
) -> BatchResult:
    """Answer every prompt, each on one rank. All ranks call it alike.

    Args:
        model: expert-parallel, with a strategy for ranks with tokens of their own.
        prompts: token ids.
        max_tokens: of each answer, one number for all or one for each.
        sampler: of this rank's sequences; of all or of each, whatever rank runs it.
        on_answer: called on every rank with each answer when it has ended, at the next
            step of any rank.
        make_generator: mlx-lm's BatchGenerator, or what stands for it.
        **options: of `make_generator`.
    """
    most = _of_each(max_tokens, len(prompts))
    lengths = [len(p) + m for p, m in zip(prompts, most, strict=True)]
    mine = assign_prompts(lengths, comm.size)[comm.rank]
    answers: list[Answer] = []
    with _progress(len(prompts), comm) as progress:

        def collect(answer: Answer) -> None:
            answers.append(answer)
            progress.update()
            if on_answer is not None:
                on_answer(answer)

        lock_step = LockStep(model, comm, collect)
        cache_bytes = _generate(
            lock_step,
            tokenizer,
            {index: prompts[index] for index in mine},
            lock_step.finished,
            most,
            _of_each(sampler, len(prompts)),
            partial(make_generator, **options),
        )
        lock_step.serve()
    return BatchResult(sorted(answers), gather_objects(comm, cache_bytes))


def generate_replicated(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    comm: Comm,
    *,
    max_tokens: int | Sequence[int],
    sampler: Sampler | Sequence[Sampler],
    on_answer: Callable[[Answer], Any] | None = None,
    make_generator: Callable[..., Any] = BatchGenerator,
    **options: Any,
) -> BatchResult:
    """Answer every prompt on every rank; arguments as `generate_sharded`.

    Args:
        model: expert-parallel, with the strategy `replicated`.
        sampler: gives the same tokens on every rank.
    """
    answers: list[Answer] = []
    with _progress(len(prompts), comm) as progress:

        def collect(answer: Answer) -> None:
            answers.append(answer)
            progress.update()
            if on_answer is not None:
                on_answer(answer)

        cache_bytes = _generate(
            model,
            tokenizer,
            dict(enumerate(prompts)),
            collect,
            _of_each(max_tokens, len(prompts)),
            _of_each(sampler, len(prompts)),
            partial(make_generator, **options),
        )
    return BatchResult(sorted(answers), gather_objects(comm, cache_bytes))


def _of_each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value] * count


def can_batch(model: nn.Module) -> bool:
    """Whether mlx-lm can run several sequences of this model at once."""
    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def _generate(
    model: nn.Module | LockStep,
    tokenizer: TokenizerWrapper,
    prompts: dict[int, list[int]],
    on_answer: Callable[[Answer], Any],
    max_tokens: Sequence[int],
    samplers: Sequence[Sampler],
    make_generator: Callable[..., Any],
) -> int:
    """Answer the prompts of this rank; the most bytes that its KV caches held.

    Args:
        prompts: by their numbers.
        max_tokens: of every number.
        samplers: of every number.
    """
    cache_bytes = num_answers = 0
    stop_tokens = [[token] for token in tokenizer.eos_token_ids]
    generator = make_generator(model, stop_tokens=stop_tokens)
    uids = generator.insert(
        list(prompts.values()),
        [max_tokens[number] for number in prompts],
        samplers=[samplers[number] for number in prompts],
    )
    number_of = dict(zip(uids, prompts, strict=True))
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    step = 0
    while num_answers < len(prompts):
        note_progress("batch", step)
        step += 1
        _, responses = generator.next()
        cache_bytes = max(cache_bytes, generator.prompt_cache_nbytes)
        if not isinstance(model, LockStep):  # all ranks run these sequences
            note_step(*(response.token for response in responses))
        for response in responses:
            if response.finish_reason != "stop":
                tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                uid, reason = response.uid, response.finish_reason
                num_answers += 1
                drafted = [getattr(response, name, None) for name in _DRAFT_COUNTS]
                on_answer(Answer(number_of[uid], tokens.pop(uid), reason, *drafted))
    generator.close()
    return cache_bytes


def _progress(num_prompts: int, comm: Comm) -> tqdm[Any]:
    return tqdm(total=num_prompts, unit="prompt", disable=comm.rank != 0)
