"""What flags ask of a model, checked before its weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep.api import PreparedModel
from mlx_ep.loading import EMBEDDED_MODEL, refuse_dense
from mlx_ep.loading.caches import CacheQuantization, cache_bytes, run_shapes
from mlx_ep.rows.option import uses_metal
from mlx_ep.tune.agree import backend_variable, forced_backend


def check_cache_flags(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: flags of the KV cache that do not go together.
    """
    if args.kv_bits is not None and args.max_kv_size is not None:
        raise ValueError(
            "--kv-bits does not go with --max-kv-size: mlx-lm cannot quantize a cache "
            f"that rotates; got {args.kv_bits} and {args.max_kv_size}. Leave one out."
        )


def check_here(args: argparse.Namespace) -> None:
    """What the flags of model and expert parallelism ask of this rank's machine.

    Raises:
        ValueError: it is not there.
    """
    backend = forced_backend([backend_variable()], args.config.backend)
    if not uses_metal() and (backend == "metal" or args.config.runner == "metal"):
        flag = "--runner metal" if args.config.runner == "metal" else "--backend metal"
        if backend_variable() == "metal":
            flag = "MLX_EP_BACKEND=metal"
        raise ValueError(
            f"{flag} needs a GPU on which MLX computes through Metal; here it computes "
            f"on {mx.default_device()}. Leave it out."
        )
    is_here = args.model == EMBEDDED_MODEL or Path(args.model).expanduser().exists()
    if args.revision is not None and is_here:
        raise ValueError(
            f"--revision is of a hub repository; --model {args.model} is on this disk. "
            "Leave it out."
        )


def check_for_model(
    args: argparse.Namespace, prepared: PreparedModel, eos_tokens: Sequence[str] = ()
) -> None:
    """Whether a model can do what flags of sampling and KV cache ask for.

    Args:
        eos_tokens: further tokens that end the text; the tokenizer learns them.

    Raises:
        ValueError: it cannot. Every rank finds the same.
    """
    if getattr(args, "record", None) is not None:
        refuse_dense(prepared.weights.placement.num_experts, "--record")
    for token in eos_tokens:
        _add_eos_token(prepared.tokenizer, token)
    check_sampling([args], prepared)
    check_cache(args, prepared)


def check_cache(args: argparse.Namespace, prepared: PreparedModel) -> None:
    """Raises:
    ValueError: the model's KV cache cannot be quantized so.
    """
    if args.kv_bits is not None:
        # Behind a token more than a group, so that there is something to quantize.
        quantization = CacheQuantization(args.kv_bits, args.kv_group_size, 0)
        cache_bytes(prepared.weights.outline(), 64, quantization)  # tells by raising


def check_context(
    prompts: Sequence[Sequence[int]], prepared: PreparedModel, flag: str
) -> None:
    """Whether prompts fit the positions that a model was made for.

    Args:
        prompts: their tokens.
        flag: that names them.

    Raises:
        ValueError: one has more tokens; what follows would be garbage.
    """
    most = most_tokens(prepared.weights.outline())
    longest = max(map(len, prompts), default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"{flag} must fit the model's context of {most} tokens; got {longest}. "
            "Shorten it."
        )


def most_tokens(model: nn.Module) -> int | None:
    """The tokens of context that a model was made for; None: its config does not say.

    Where the positions are scaled (``rope_scaling``), as many times more.
    """
    for part in (model, getattr(model, "language_model", None)):
        args = getattr(part, "args", None)
        found = getattr(args, "max_position_embeddings", None)
        if found:
            scaling = getattr(args, "rope_scaling", None) or {}
            original = scaling.get("original_max_position_embeddings") or found
            return max(int(found), int(original * (scaling.get("factor") or 1)))
    return None


def check_sampling(
    flags: Sequence[argparse.Namespace], prepared: PreparedModel
) -> None:
    """Raises:
    ValueError: flags name more tokens than the model has.
    """
    top_k = max(each.top_k for each in flags)
    least = max(each.min_tokens_to_keep for each in flags)
    if top_k == 0 and least == 1:
        return
    model = prepared.weights.outline()
    vocabulary = run_shapes(model, 1, make_prompt_cache(model)).shape[-1]
    for flag, number in (("--top-k", top_k), ("--min-tokens-to-keep", least)):
        if number >= vocabulary:
            raise ValueError(
                f"{flag} must be below the number of the model's tokens, {vocabulary}; "
                f"got {number}."
            )


def _add_eos_token(tokenizer: TokenizerWrapper, token: str) -> None:
    """Raises:
    ValueError: it is no token of this tokenizer.
    """
    known = tokenizer.get_vocab()
    is_number = token.isdecimal() and int(token) < tokenizer.vocab_size
    if token not in known and not is_number:
        raise ValueError(
            "--extra-eos-token must be tokens of the model, as text or number; got "
            f"{token!r}, which its tokenizer does not have."
        )
    tokenizer.add_eos_token(token)
