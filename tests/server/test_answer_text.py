"""Stop strings, thoughts and calls, however the text is cut into tokens."""

from __future__ import annotations

import random

import pytest

from mlx_ep.server.answer_text import AnswerText, Piece, StopText
from mlx_ep.server.texts import Texts
from tests.support.http_serving import end_token, ids, tokenizer


def _cut_by_hand(text: str, stops: list[str]) -> tuple[str, str]:
    """The text before the first stop string, and that string."""
    places = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    if not places:
        return text, ""
    place, _, stop = min(places)
    return text[:place], stop


def test_stop_text_is_that_of_the_whole_text() -> None:
    rng = random.Random(0)
    matched = 0
    for _ in range(2000):
        text = "".join(rng.choice("aab") for _ in range(rng.randrange(1, 14)))
        stops = [
            "".join(rng.choice("ab") for _ in range(rng.randrange(1, 5)))
            for _ in range(rng.randrange(1, 4))
        ]
        stop_text, shown, rest = StopText(stops), "", text
        while rest and not stop_text.matched:
            size = rng.randrange(1, 4)
            shown += stop_text.add(rest[:size])
            rest = rest[size:]
            fed = text[: len(text) - len(rest)]
            # Nothing is shown that a stop string takes back.
            assert _cut_by_hand(fed, stops)[0].startswith(shown)
        if not stop_text.matched:
            shown += stop_text.rest()
        # What came behind the match in the same part may hold an earlier, longer one.
        fed = text[: len(text) - len(rest)]
        assert (shown, stop_text.matched) == _cut_by_hand(fed, stops)
        matched += bool(stop_text.matched)
    assert 500 < matched < 2000


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stop_text = StopText(["END", "\n\n"])
    parts = [stop_text.add(part) for part in ("a E", "x", "EN", "N", "\n", "b")]
    assert parts == ["a ", "Ex", "", "ENN", "", "\nb"]


def _pieces(text: str, initial: str = "normal", stops: tuple[str, ...] = ()) -> tuple:
    answer = Texts(tokenizer()).answer(initial, stops)
    pieces: list[Piece] = []
    for token in [*ids(text), end_token()]:
        pieces += answer.add(token)
        if answer.stopped:
            break
    return _joined(pieces + answer.end()), answer


def _joined(pieces: list[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].kind == piece.kind != "tool":
            piece = Piece(piece.kind, found.pop().text + piece.text)
        found.append(piece)
    return found


def test_thoughts_calls_and_text_are_apart() -> None:
    call = '{"name": "f", "arguments": {}}'
    text = f"<think>so</think>Yes.<tool_call>{call}</tool_call>"
    pieces, _ = _pieces(text + f"<tool_call>{call}</tool_call> <x")
    assert pieces == [
        Piece("reasoning", "so"),
        Piece("text", "Yes."),
        Piece("tool", call),
        Piece("tool", call),
        Piece("text", " <x"),
    ]


def test_a_prompt_may_have_begun_the_thought() -> None:
    pieces, _ = _pieces("well</think>No.", initial="reasoning")
    assert pieces == [Piece("reasoning", "well"), Piece("text", "No.")]


def test_a_call_that_is_cut_off_is_given_as_it_is() -> None:
    pieces, _ = _pieces("<tool_call>{")
    assert pieces == [Piece("tool", "{")]


@pytest.mark.parametrize("stop", ["worm", "m i", "a worm is", "is a"])
def test_stop_strings_across_tokens(stop: str) -> None:
    text = "What a worm is and is a pity"
    pieces, answer = _pieces(text, stops=(stop,))
    assert answer.stopped == stop
    assert pieces == [Piece("text", text[: text.index(stop)])]
    assert isinstance(answer, AnswerText)


def test_characters_of_several_tokens() -> None:
    text = "naïve 日本 🙂 done"
    pieces, _ = _pieces(text)
    assert pieces == [Piece("text", text)]
