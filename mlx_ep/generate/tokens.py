"""From the words of a prompt to its tokens, as the flags of mlx_ep.generate say."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

ChatMessage = dict[str, str]


def user_message(prompt: str) -> ChatMessage:
    """The user's words as a message of a conversation."""
    return {"role": "user", "content": prompt}


def prompt_tokens(
    args: argparse.Namespace,
    tokenizer: TokenizerWrapper,
    messages: list[ChatMessage],
) -> list[int]:
    """The tokens of a conversation, in the model's chat template if it has one."""
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(messages[-1]["content"])
    return _chat_prompt(args, tokenizer, messages, tokenize=True)


def tokens_after_cache(
    args: argparse.Namespace,
    tokenizer: TokenizerWrapper,
    messages: list[ChatMessage],
) -> list[int]:
    """The tokens behind those of a prompt cache: all that follows in the template.

    As in mlx_lm.generate: what comes before the user's words is in the cache.
    """
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(messages[-1]["content"])
    text = _chat_prompt(args, tokenizer, messages, tokenize=False)
    query = "<query>"
    template = _chat_prompt(args, tokenizer, [user_message(query)], tokenize=False)
    suffix = text[template.index(query) :]
    return tokenizer.encode(suffix, add_special_tokens=False)


def _chat_prompt(
    args: argparse.Namespace,
    tokenizer: TokenizerWrapper,
    messages: list[ChatMessage],
    tokenize: bool,
) -> Any:
    messages = list(messages)
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    has_prefill = args.prefill_response is not None
    if has_prefill:
        messages.append({"role": "assistant", "content": args.prefill_response})
    return tokenizer.apply_chat_template(
        messages,
        tokenize=tokenize,
        continue_final_message=has_prefill,
        add_generation_prompt=not has_prefill,
        **args.chat_template_config,
    )
