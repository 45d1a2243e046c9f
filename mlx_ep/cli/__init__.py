"""What commands share: flags, starting on all ranks, sampling, checks, reports."""

from mlx_ep.cli.checks import (
    check_cache,
    check_cache_flags,
    check_for_model,
    check_sampling,
)
from mlx_ep.cli.flags import (
    PLACEMENT,
    add_config_flags,
    add_ep_flags,
    add_model_flags,
    add_ranks_flag,
    check_strategy,
)
from mlx_ep.cli.generation import (
    add_cache_flags,
    add_sampling_flags,
    cache_options,
    rank_sampler,
    seed_ranks,
    shared_sampler,
)
from mlx_ep.cli.inputs import on_rank_0, read_text
from mlx_ep.cli.parser import (
    Parser,
    UsageError,
    above_zero,
    at_least,
    at_least_zero,
    fraction,
    gigabytes,
    half,
    not_empty,
    positive,
)
from mlx_ep.cli.prompt_cache import PromptCache, read_prompt_cache
from mlx_ep.cli.run import prepare_model, print_reports, run, usage_errors

__all__ = [
    "Parser",
    "UsageError",
    "above_zero",
    "at_least",
    "at_least_zero",
    "fraction",
    "gigabytes",
    "half",
    "not_empty",
    "positive",
    "PLACEMENT",
    "add_config_flags",
    "add_ep_flags",
    "add_model_flags",
    "add_ranks_flag",
    "check_strategy",
    "add_cache_flags",
    "add_sampling_flags",
    "cache_options",
    "rank_sampler",
    "seed_ranks",
    "shared_sampler",
    "check_cache",
    "check_cache_flags",
    "check_for_model",
    "check_sampling",
    "PromptCache",
    "read_prompt_cache",
    "on_rank_0",
    "read_text",
    "prepare_model",
    "print_reports",
    "run",
    "usage_errors",
]
