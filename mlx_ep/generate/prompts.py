"""Prompts as the user gives them: one, or a file of many with settings of their own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_ep import cli
from mlx_ep.generate.tokens import ChatMessage, user_message

# What a line may set for itself, and what its value must be.
_SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_tokens": cli.positive,
    "temp": cli.at_least_zero,
    "top_p": cli.fraction,
    "min_p": cli.fraction,
    "min_tokens_to_keep": cli.positive,
    "top_k": cli.at_least(0),
    "xtc_probability": cli.fraction,
    "xtc_threshold": cli.half,
}
_KEYS = ("prompt", "messages", "id", *_SETTINGS)


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    Attributes:
        messages: the conversation; the last message is the user's.
        id: as the file says; None: it says none.
        settings: flags of which the line has values of its own.
    """

    messages: list[ChatMessage]
    id: str | int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> Any:
        """The user's last words."""
        return self.messages[-1]["content"]

    def flags(self, args: argparse.Namespace) -> argparse.Namespace:
        """The command's flags with those of this prompt."""
        return argparse.Namespace(**{**vars(args), **self.settings})


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of --prompts-file.

    Raises:
        ValueError: there are none, or one is not in order.
        OSError: the file cannot be read.
    """
    file = args.prompts_file
    return parse_prompts(
        file.read_text(encoding="utf-8"), file.suffix == ".jsonl", str(file)
    )


def parse_prompts(text: str, is_jsonl: bool, name: str) -> list[Prompt]:
    """The prompts in a file; empty lines are left out.

    Args:
        text: the file's content.
        is_jsonl: whether each line is a JSON object with a ``prompt`` or ``messages``;
            else each line is a prompt.
        name: of the file, for errors.

    Raises:
        ValueError: a line is not such an object, two have one id, or there is no
            prompt at all.
    """
    prompts = []
    lines_of: dict[str | int, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        if not is_jsonl:
            prompts.append(Prompt([user_message(line.strip())]))
            continue
        prompt = _parse_object(line, where)
        if prompt.id is not None and prompt.id in lines_of:
            raise ValueError(
                f'{where}: every "id" must be another one; {prompt.id!r} is that of '
                f"line {lines_of[prompt.id]} too."
            )
        if prompt.id is not None:
            lines_of[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{name} must hold at least one prompt.")
    return prompts


def _parse_object(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise ValueError(
            f'{where} must be an object with a "prompt" or "messages", and not both; '
            f"got {line.strip()[:60]}"
        )
    if unknown := sorted(set(record) - set(_KEYS)):
        raise ValueError(
            f"{where} may have the keys {', '.join(_KEYS)}; got {', '.join(unknown)}."
        )
    name = record.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ValueError(f'{where}: "id" must be a text or a whole number; got {name}.')
    settings = {
        key: _setting(key, record[key], where) for key in _SETTINGS if key in record
    }
    return Prompt(_messages(record, where), name, settings)


def _messages(record: dict[str, Any], where: str) -> list[ChatMessage]:
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f'{where}: "prompt" must be a text that is not empty; got {prompt!r}.'
            )
        return [user_message(prompt)]
    messages = record["messages"]
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise ValueError(
        f'{where}: "messages" must be a list of objects with a "role" and a "content" '
        f"that is a text; got {json.dumps(messages)[:60]}"
    )


def _setting(key: str, value: Any, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'{where}: "{key}" must be a number; got {value!r}.')
    try:
        return _SETTINGS[key](str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f'{where}: "{key}" {error}.') from None


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"role", "content"} <= set(value)
        and isinstance(value["role"], str)
        and isinstance(value["content"], str)
    )
