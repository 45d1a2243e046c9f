"""What commands share: flags, starting on all ranks, sampling, checks, reports.

The names below are imported when they are first used: a command that needs no model,
such as `mlx_ep.simulate`, does not load mlx-lm and its tokenizers for its flags.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_ep.cli.checks import (
        check_cache,
        check_cache_flags,
        check_context,
        check_for_model,
        check_sampling,
        most_tokens,
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
        KV_BITS,
        KV_GROUP_SIZES,
        add_cache_flags,
        add_sampling_flags,
        cache_options,
        rank_sampler,
        seed_ranks,
        shared_sampler,
    )
    from mlx_ep.cli.inputs import (
        PICTURES,
        add_json_flag,
        beside,
        check_output,
        check_outputs,
        on_rank_0,
        read_text,
        whole_file,
        write_json,
    )
    from mlx_ep.cli.parser import (
        Parser,
        UsageError,
        above_zero,
        at_least,
        at_least_zero,
        fraction,
        gigabytes,
        half,
        json_object,
        not_empty,
        part,
        positive,
    )
    from mlx_ep.cli.prompt_cache import PromptCache, read_prompt_cache
    from mlx_ep.cli.record import add_record_flag, check_record_name, recorded
    from mlx_ep.cli.say import interruptible, rank_of_environment
    from mlx_ep.cli.start import prepare_model, print_reports, run, usage_errors

_HOMES = {
    "check_cache": "checks",
    "check_context": "checks",
    "most_tokens": "checks",
    "check_cache_flags": "checks",
    "check_for_model": "checks",
    "check_sampling": "checks",
    "PLACEMENT": "flags",
    "add_config_flags": "flags",
    "add_ep_flags": "flags",
    "add_model_flags": "flags",
    "add_ranks_flag": "flags",
    "check_strategy": "flags",
    "KV_BITS": "generation",
    "KV_GROUP_SIZES": "generation",
    "add_cache_flags": "generation",
    "add_sampling_flags": "generation",
    "cache_options": "generation",
    "rank_sampler": "generation",
    "seed_ranks": "generation",
    "shared_sampler": "generation",
    "add_json_flag": "inputs",
    "beside": "inputs",
    "check_output": "inputs",
    "check_outputs": "inputs",
    "on_rank_0": "inputs",
    "read_text": "inputs",
    "PICTURES": "inputs",
    "whole_file": "inputs",
    "write_json": "inputs",
    "Parser": "parser",
    "UsageError": "parser",
    "above_zero": "parser",
    "at_least": "parser",
    "at_least_zero": "parser",
    "fraction": "parser",
    "gigabytes": "parser",
    "half": "parser",
    "json_object": "parser",
    "not_empty": "parser",
    "part": "parser",
    "positive": "parser",
    "PromptCache": "prompt_cache",
    "read_prompt_cache": "prompt_cache",
    "add_record_flag": "record",
    "check_record_name": "record",
    "recorded": "record",
    "prepare_model": "start",
    "print_reports": "start",
    "run": "start",
    "usage_errors": "start",
    "interruptible": "say",
    "rank_of_environment": "say",
}

__all__ = [
    "Parser",
    "UsageError",
    "above_zero",
    "at_least",
    "at_least_zero",
    "fraction",
    "gigabytes",
    "half",
    "json_object",
    "not_empty",
    "part",
    "positive",
    "PLACEMENT",
    "add_config_flags",
    "add_ep_flags",
    "add_model_flags",
    "add_ranks_flag",
    "check_strategy",
    "KV_BITS",
    "KV_GROUP_SIZES",
    "add_cache_flags",
    "add_sampling_flags",
    "cache_options",
    "rank_sampler",
    "seed_ranks",
    "shared_sampler",
    "check_cache",
    "check_context",
    "most_tokens",
    "check_cache_flags",
    "check_for_model",
    "check_sampling",
    "PromptCache",
    "read_prompt_cache",
    "add_json_flag",
    "beside",
    "check_output",
    "check_outputs",
    "PICTURES",
    "whole_file",
    "write_json",
    "on_rank_0",
    "read_text",
    "add_record_flag",
    "check_record_name",
    "recorded",
    "prepare_model",
    "print_reports",
    "run",
    "usage_errors",
    "interruptible",
    "rank_of_environment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlx_ep.cli' has no attribute {name!r}")
    return getattr(import_module(f"mlx_ep.cli.{_HOMES[name]}"), name)
