"""Many prompts from a file, and their answers as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep.cli.prompt_tokens import Message, user_message
from mlx_ep.data_parallel import Answer


def parse_prompts(text: str, is_jsonl: bool, name: str) -> list[list[Message]]:
    """The conversation of every prompt in a file; empty lines are left out.

    Args:
        text: the file's content.
        is_jsonl: whether each line is a JSON object with a ``prompt`` or ``messages``;
            else each line is a prompt.
        name: of the file, for errors.

    Raises:
        ValueError: a line is not such an object, or there is no prompt at all.
    """
    conversations = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{name}, line {number}"
            conversations.append(
                _parse_object(line, where) if is_jsonl else [user_message(line.strip())]
            )
    if not conversations:
        raise ValueError(f"{name} must hold at least one prompt.")
    return conversations


def _parse_object(line: str, where: str) -> list[Message]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(prompt, str) and prompt:
        return [user_message(prompt)]
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise ValueError(
        f'{where} must be an object with a "prompt" (a string that is not empty) or '
        f'"messages" (a list of objects with a "role" and a "content"); got '
        f"{line.strip()[:60]}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= set(value)


def write_answers(
    file: TextIO,
    answers: Sequence[Answer],
    conversations: Sequence[list[Message]],
    prompt_lengths: Sequence[int],
    tokenizer: TokenizerWrapper,
) -> None:
    """One JSON object per answer: index, prompt, text, token counts, finish_reason."""
    for answer in answers:
        record = {
            "index": answer.prompt,
            "prompt": conversations[answer.prompt][-1]["content"],
            "text": tokenizer.decode(answer.tokens),
            "prompt_tokens": prompt_lengths[answer.prompt],
            "generation_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def open_output(path: Path | None) -> TextIO:
    """The file to write to, or the standard output.

    Raises:
        ValueError: the file cannot be written.
    """
    if path is None:
        return sys.stdout
    try:
        return path.open("w")
    except OSError as error:
        raise ValueError(f"--output {path}: {error}") from error
