"""A draft model for speculative decoding: a whole model of mlx-lm on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import (
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from mlx_ep.api import (
    RunnerName,
    has_routed_experts,
    run_alone,
    runner_problem,
)
from mlx_ep.comm import Comm, agreed
from mlx_ep.loading import find_model


@dataclass(frozen=True)
class Draft:
    """A draft model that every rank has found and none has read.

    It is small: every rank holds all of it, and drafts without a collective.

    Attributes:
        path: its folder.
        runner: of its experts; None: mlx-lm's own block.
    """

    path: Path
    runner: RunnerName | None = None

    def outline(self) -> nn.Module:
        """The model, whose weights are not read."""
        model, _ = load_model(self.path, lazy=True)
        return model

    def load(self) -> nn.Module:
        """Read it, all of it.

        Raises:
            ValueError: its runner cannot run its experts.
        """
        model, _ = mlx_lm.load(str(self.path))
        if self.runner is None:
            return model
        try:
            return run_alone(model, self.runner)
        except ValueError as error:
            raise ValueError(f"--draft-runner {self.runner}: {error}") from error


def prepare_draft(
    path_or_repo: str,
    tokenizer: TokenizerWrapper,
    comm: Comm,
    runner: RunnerName | None = None,
) -> Draft:
    """Find a draft model; no weight is read. Every rank must call it.

    Args:
        path_or_repo: what ``mlx_lm.generate --draft-model`` takes, or ``jargon-moe``.
        tokenizer: of the model that it drafts for.
        runner: of its experts; None: mlx-lm's own block.

    Raises:
        ValueError: on every rank: there is no such model, its tokens are others, or
            the runner cannot run its experts.
    """
    return agreed(comm, lambda: _checked(path_or_repo, tokenizer, runner))


def _checked(
    path_or_repo: str, tokenizer: TokenizerWrapper, runner: RunnerName | None
) -> Draft:
    draft = Draft(_checked_path(path_or_repo, tokenizer), runner)
    if runner is None:
        return draft
    if not has_routed_experts(draft.outline()):
        raise ValueError(
            f"--draft-runner {runner} is for a draft with routed experts; "
            f"--draft-model {path_or_repo} has none. Leave --draft-runner out."
        )
    if problem := runner_problem(draft.outline(), runner):
        raise ValueError(
            f"--draft-runner {runner} cannot run the experts of --draft-model "
            f"{path_or_repo} here: {problem}. Give another one, or leave it out."
        )
    return draft


def _checked_path(path_or_repo: str, tokenizer: TokenizerWrapper) -> Path:
    try:
        path = find_model(path_or_repo)
        drafts = load_tokenizer(path)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split()).replace("--model", "--draft-model")
        if "--draft-model" not in reason:
            reason = f"--draft-model: {reason}"
        raise ValueError(reason) from error
    if drafts.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"--draft-model {path_or_repo} must have the model's tokens: its "
            f"tokenizer has {drafts.vocab_size}, the model's {tokenizer.vocab_size}."
        )
    return path


def check_trimmable(model: nn.Module) -> None:
    """Whether tokens that were drafted wrongly can be taken back from the KV cache.

    Of one sequence; the shapes of the model are enough.

    mlx-lm asks once, before the first token; a sliding window says yes until it is
    full, and from then on keeps the wrong tokens.

    Raises:
        ValueError: they cannot.
    """
    cache = make_prompt_cache(model)
    has_window = any(isinstance(layer, RotatingKVCache) for layer in cache)
    if has_window or not can_trim_prompt_cache(cache):
        kinds = sorted({type(layer).__name__ for layer in cache})
        raise ValueError(
            "--draft-model needs a KV cache from which tokens can be taken back; this "
            f"model's ({', '.join(kinds)}) cannot."
        )


def draft_report(num_accepted: int, num_drafted: int) -> str:
    """A line of how many of the proposed tokens were taken."""
    share = 100 * num_accepted / max(num_drafted, 1)
    return f"Draft: {num_accepted} of {num_drafted} tokens accepted ({share:.1f}%)"
