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
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_ep.comm import Comm, gather_objects, note_progress
from mlx_ep.types import Sampler, TokenCounts, to_host


class Answer(NamedTuple):
    """What was generated for one prompt.

    Attributes:
        prompt: its number.
        tokens: without the one that ended it.
        finish_reason: ``stop`` or ``length``.
    """

    prompt: int
    tokens: list[int]
    finish_reason: str


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
        num_finished: sequences that this rank has finished; shown as progress.
    """

    model: nn.Module
    comm: Comm
    progress: tqdm[Any]
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
            for block in self.model.expert_parallel.blocks:
                block.serve()

    def finished(self) -> None:
        """Count one more finished sequence; the next step tells the others."""
        self.num_finished += 1

    def _begin(self, num_tokens: int, is_done: bool) -> bool:
        """Agree on a step; False when no rank has anything left."""
        status = mx.array([[num_tokens, not is_done, self.num_finished]], mx.int32)
        # sync: the shapes of the step's exchanges depend on it.
        ranks = to_host(self.comm.all_gather(status))
        tokens = TokenCounts(tuple(ranks[:, 0].tolist()))  # on host
        self.model.expert_parallel.group.step.tokens = tokens
        if newly_finished := int(ranks[:, 2].sum()) - self.progress.n:
            self.progress.update(newly_finished)
        return bool(ranks[:, 1].any())


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
    max_tokens: int,
    sampler: Sampler,
    **options: Any,
) -> BatchResult:
    """Answer every prompt, each on one rank. All ranks call it alike.

    Args:
        model: expert-parallel, with a strategy for ranks with tokens of their own.
        prompts: token ids.
        max_tokens: of each answer.
        sampler: of this rank's sequences.
        **options: of mlx-lm's BatchGenerator.
    """
    mine = assign_prompts([len(p) + max_tokens for p in prompts], comm.size)[comm.rank]
    with _progress(len(prompts), comm) as progress:
        lock_step = LockStep(model, comm, progress)
        answers, cache_bytes = _generate(
            lock_step,
            tokenizer,
            {index: prompts[index] for index in mine},
            lock_step.finished,
            max_tokens=max_tokens,
            sampler=sampler,
            **options,
        )
        lock_step.serve()
    gathered = gather_objects(comm, [answers, cache_bytes])
    everyone = [Answer(*a) for rank_answers, _ in gathered for a in rank_answers]
    return BatchResult(sorted(everyone), [peak for _, peak in gathered])


def generate_replicated(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    comm: Comm,
    *,
    max_tokens: int,
    sampler: Sampler,
    **options: Any,
) -> BatchResult:
    """Answer every prompt on every rank; arguments as `generate_sharded`.

    Args:
        model: expert-parallel, with the strategy `replicated`.
        sampler: gives the same tokens on every rank.
    """
    with _progress(len(prompts), comm) as progress:
        answers, cache_bytes = _generate(
            model,
            tokenizer,
            dict(enumerate(prompts)),
            progress.update,
            max_tokens=max_tokens,
            sampler=sampler,
            **options,
        )
    return BatchResult(sorted(answers), gather_objects(comm, cache_bytes))


def can_batch(model: nn.Module) -> bool:
    """Whether mlx-lm can run several sequences of this model at once."""
    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def _generate(
    model: nn.Module | LockStep,
    tokenizer: TokenizerWrapper,
    prompts: dict[int, list[int]],
    on_finished: Callable[[], Any],
    *,
    max_tokens: int,
    **options: Any,
) -> tuple[list[Answer], int]:
    """Answers to the prompts of this rank, and the most bytes of its KV caches."""
    answers: list[Answer] = []
    cache_bytes = 0
    stop_tokens = [[token] for token in tokenizer.eos_token_ids]
    generator = BatchGenerator(model, stop_tokens=stop_tokens, **options)
    uids = generator.insert(list(prompts.values()), [max_tokens] * len(prompts))
    index_of = dict(zip(uids, prompts, strict=True))
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    step = 0
    while len(answers) < len(prompts):
        note_progress("batch", step)
        step += 1
        _, responses = generator.next()
        cache_bytes = max(cache_bytes, generator.prompt_cache_nbytes)
        for response in responses:
            if response.finish_reason != "stop":
                tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                uid, reason = response.uid, response.finish_reason
                answers.append(Answer(index_of[uid], tokens[uid], reason))
                on_finished()
    generator.close()
    return answers, cache_bytes


def _progress(num_prompts: int, comm: Comm) -> tqdm[Any]:
    return tqdm(total=num_prompts, unit="prompt", disable=comm.rank != 0)
