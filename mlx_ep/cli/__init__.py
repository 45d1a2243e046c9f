"""What commands share: flags, starting on all ranks, prompts, sampling, reports."""

from mlx_ep.cli.flags import (
    add_ep_flags,
    add_model_flags,
    add_placement_flags,
    add_ranks_flag,
    check_strategy,
    ep_config,
)
from mlx_ep.cli.parser import (
    Parser,
    UsageError,
    at_least_zero,
    fraction,
    gigabytes,
    positive,
)
from mlx_ep.cli.prompt_tokens import prompt_tokens, tokens_after_cache, user_message
from mlx_ep.cli.prompts_file import open_output, parse_prompts, write_answers
from mlx_ep.cli.reuse import (
    add_reuse_flags,
    check_reuse_flags,
    find_draft,
    read_cache,
    reuse_options,
)
from mlx_ep.cli.run import prepare_model, print_reports, run, usage_errors
from mlx_ep.cli.sampling import (
    add_sampling_flags,
    rank_sampler,
    seed_ranks,
    shared_sampler,
)

__all__ = [
    "Parser",
    "UsageError",
    "at_least_zero",
    "fraction",
    "gigabytes",
    "positive",
    "add_ep_flags",
    "add_model_flags",
    "add_placement_flags",
    "add_ranks_flag",
    "check_strategy",
    "ep_config",
    "prepare_model",
    "print_reports",
    "run",
    "usage_errors",
    "open_output",
    "parse_prompts",
    "write_answers",
    "prompt_tokens",
    "tokens_after_cache",
    "user_message",
    "add_reuse_flags",
    "check_reuse_flags",
    "find_draft",
    "read_cache",
    "reuse_options",
    "add_sampling_flags",
    "rank_sampler",
    "seed_ranks",
    "shared_sampler",
]
