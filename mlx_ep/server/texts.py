"""What the HTTP side does with the tokenizer: prompts, grammars, texts of tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep.server.answer_text import AnswerText
from mlx_ep.server.errors import ApiError, wrong

# JSON on one line: with any white space allowed a model may write nothing else.
_ONE_LINE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
# Of mlx_lm.server, for a tokenizer without a chat template.
_ROLES = {
    "system": "ASSISTANT's RULE: ",
    "user": "USER: ",
    "assistant": "ASSISTANT: ",
    "stop": "\n",
}


@dataclass(frozen=True)
class PromptTokens:
    """Token ids, and the state in which the answer begins."""

    tokens: tuple[int, ...]
    initial: str = "normal"


class Texts:
    """A model's tokenizer as a server uses it. Its methods may take milliseconds.

    Args:
        template_arguments: of every chat, below what a request says.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_arguments = dict(template_arguments or {})
        self.vocabulary = len(tokenizer)
        self.machine: TextStateMachine = make_text_state_machine(tokenizer)

    def knows(self, argument: str) -> bool:
        """Whether the chat template reads an argument of this name."""
        return argument in str(self.tokenizer.chat_template or "")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        roles: Mapping[str, str] | None = None,
    ) -> PromptTokens:
        """The prompt that the model's chat template makes of a conversation.

        Args:
            arguments: of the template, from the request.
            roles: prefixes, for a tokenizer without a template.

        Raises:
            ApiError: 400: the template refuses the conversation.
        """
        if not self.tokenizer.has_chat_template:
            if tools:
                raise wrong("tools", "need a chat template; this model has none")
            return PromptTokens(self._ids(_plain_chat(messages, roles or _ROLES)))
        try:
            tokens = self.tokenizer.apply_chat_template(
                [self._known_role(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=True,
                **{**self.template_arguments, **arguments},
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())
            raise wrong(
                "messages", f"must be what the model's chat template takes: {said}"
            ) from error
        return PromptTokens(tuple(tokens), self._initial(tokens))

    def _known_role(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Most templates know the developer of newer APIs as system only."""
        if message["role"] == "developer" and not self.knows("developer"):
            return {**message, "role": "system"}
        return dict(message)

    def _initial(self, tokens: list[int]) -> str:
        tokenizer = self.tokenizer
        if tokenizer.response_initial_state:
            return tokenizer.response_initial_state
        if tokenizer.has_thinking and (
            tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
        ):
            return "reasoning"
        return "normal"

    def text(self, prompt: str, param: str = "prompt") -> PromptTokens:
        """A text as it is.

        Raises:
            ApiError: 400: it has no tokens.
        """
        tokens = self._ids(prompt)
        if not tokens:
            raise wrong(param, "must not be empty")
        return PromptTokens(tokens)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def answer(self, initial: str, stops: Sequence[str]) -> AnswerText:
        return AnswerText(self.tokenizer, self.machine, initial, stops)

    def stop_tokens(self, stops: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Ids for the engine to end at, where they hold the stop string for certain.

        What a stop string is made of otherwise is found in the text.
        """
        found = []
        for stop in stops:
            ids = tuple(self.tokenizer.encode(stop, add_special_tokens=False))
            if ids and stop in self.tokenizer.decode(list(ids)):
                found.append(ids)
        return tuple(found)

    @functools.cached_property
    def _library(self) -> LLTokenizer:
        return from_tokenizer(
            self.tokenizer._tokenizer,
            eos_token=sorted(self.tokenizer.eos_token_ids),
        )

    def token_bytes(self, token: int) -> bytes:
        """What a token is in UTF-8, which may be a part of a character."""
        if self._library.is_special_token(token):
            return self.token_text(token).encode()
        return self._library.decode_bytes([token])

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def json_grammar(self, schema: Mapping[str, Any] | None, param: str) -> str:
        """A grammar whose texts are JSON, of a schema or any object.

        Raises:
            ApiError: 400: the grammar library cannot compile the schema.
        """
        wanted = {"type": "object"} if schema is None else dict(schema)
        grammar = LLMatcher.grammar_from_json_schema(wanted, overrides=_ONE_LINE)
        return self._checked(grammar, param)

    def call_grammar(self, tools: Sequence[Mapping[str, Any]], param: str) -> str:
        """A grammar whose texts are one call of one of some functions.

        Args:
            tools: in OpenAI's form.

        Raises:
            ApiError: 400: the model's calls are not JSON between two markers, or a
                function's schema cannot be compiled.
        """
        tokenizer = self.tokenizer
        parser = getattr(tokenizer.tool_parser, "__module__", "")
        if not tokenizer.has_tool_calling or not parser.endswith("json_tools"):
            raise wrong(
                param,
                "must be 'auto' or 'none': this model's tool calls cannot be forced",
            )
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": tool["function"].get("parameters")
                    or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        start, end = (
            self._terminal(text)
            for text in (tokenizer.tool_call_start, tokenizer.tool_call_end)
        )
        wanted = {"anyOf": calls, "x-guidance": _ONE_LINE}
        lark = f"start: {start} call {end}\ncall: %json {json.dumps(wanted)}\n"
        return self._checked(LLMatcher.grammar_from_lark(lark), param)

    def _terminal(self, marker: str) -> str:
        """A marker in a grammar: a special token by its number, else its text."""
        ids = self.tokenizer.encode(marker, add_special_tokens=False)
        if len(ids) == 1 and self._library.is_special_token(ids[0]):
            return f"<[{ids[0]}]>"
        return json.dumps(marker)

    def _checked(self, grammar: str, param: str) -> str:
        problem = LLMatcher.validate_grammar(grammar, self._library)
        if problem and not problem.startswith("WARNING"):
            said = " ".join(problem.split())
            raise ApiError(
                400,
                f"{param} must be a JSON schema that can be compiled: {said}",
                param,
                "invalid_json_schema",
            )
        return grammar


def _plain_chat(messages: Sequence[Mapping[str, Any]], roles: Mapping[str, str]) -> str:
    """As mlx_lm.server writes a conversation without a template."""
    lines = [
        f"{roles.get(message['role'], '')}{message['content']}{roles.get('stop', '')}"
        for message in messages
    ]
    return ("".join(lines) + roles.get("assistant", "")).rstrip()
