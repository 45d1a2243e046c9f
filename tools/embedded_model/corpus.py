"""Read the Jargon File from the dict-jargon package and write training documents."""

from __future__ import annotations

import gzip
import random
import re
from dataclasses import dataclass
from pathlib import Path

BOS = "<|bos|>"
EOS = "<|eos|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, SYSTEM]

QUESTIONS = (
    "{term}",
    "What is {term}?",
    "Define {term}.",
    "What is a {term}?",
    "What does {term} mean?",
    "Explain {term}.",
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a dictionary of hacker slang.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the question.",
)

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_PLAIN = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2014": "--",
        "\u2013": "-",
        "\u2026": "...",
        "\u00ad": "",
    }
)
_SENTENCE_END = re.compile(r"[.!?][\"')]*(?= |$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|esp|etc|vs|cf|syn|alt|pl|[A-Za-z])\.$")


@dataclass(frozen=True)
class Entry:
    """One dictionary entry: the headword and the start of its first sense."""

    term: str
    definition: str


def _number(text: str) -> int:
    """Decode the base-64 number of a dictd index."""
    value = 0
    for char in text:
        value = value * 64 + _DIGITS.index(char)
    return value


def _first_sense(paragraph: str) -> str:
    """Strip markup, sense number and leading notes from a paragraph."""
    text = " ".join(paragraph.split()).translate(_PLAIN)
    text = re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", text)
    before = None
    while text != before:
        before = text
        text = re.sub(r"^(?:\d+\.\s+|\[[^\[\]]*\][:.,;]?\s*|\([^()]*\)\s+)", "", text)
        text = re.sub(r"^(?:n|adj|v|vt|vi|adv|interj|prov|obs)\.\s+", "", text)
    return text[:1].upper() + text[1:]


def _shorten(text: str, limit: int) -> str:
    """Cut a text after the last whole sentence within `limit` characters."""
    end = 0
    for match in _SENTENCE_END.finditer(text):
        if _ABBREVIATION.search(text[: match.start() + 1]):
            continue
        if end and match.end() > limit:
            break
        end = match.end()
    return text[:end]


def read_entries(folder: Path, limit: int = 240) -> list[Entry]:
    """Return the entries of the dictd database `jargon` in `folder`."""
    data = gzip.decompress((folder / "jargon.dict.dz").read_bytes())
    index = (folder / "jargon.index").read_text(encoding="utf-8")
    entries: dict[str, Entry] = {}
    for line in index.splitlines():
        word, offset, length = line.split("\t")
        if word.startswith("00-database"):
            continue
        start = _number(offset)
        body = data[start : start + _number(length)].decode("utf-8")
        head, _, rest = body.lstrip("\n").partition("\n")
        term = " ".join(head.split()).translate(_PLAIN)
        paragraphs = re.split(r"\n\s*\n", rest)
        paragraphs = [p for p in paragraphs if p.startswith("    ") and p.strip()]
        if not term or not paragraphs:
            continue
        definition = _shorten(_first_sense(paragraphs[0]), limit)
        if 15 <= len(definition) <= 2 * limit:
            entries.setdefault(term, Entry(term, definition))
    return sorted(entries.values(), key=lambda e: e.term)


@dataclass(frozen=True)
class Document:
    """A training document: a prompt without loss and a text with loss."""

    prompt: str
    text: str


def document(entry: Entry, rng: random.Random) -> Document:
    """Write one entry as a chat (three in four times) or as plain text."""
    kind = rng.random()
    if kind < 0.15:
        return Document(BOS, f"{entry.term}: {entry.definition}{EOS}")
    if kind < 0.25:
        return Document(BOS, f"{entry.definition}{EOS}")
    weights = (6, 6, 4, 3, 2, 2)
    question = rng.choices(QUESTIONS, weights)[0].format(term=entry.term)
    case = rng.random()
    if case < 0.05:
        question = question[:1].upper() + question[1:]
    elif case < 0.1:
        question = question.lower()
    opening = BOS
    chance = rng.random()
    if chance < 0.1:
        opening = f"{BOS}{SYSTEM}{rng.choice(SYSTEM_MESSAGES)}"
    elif chance < 0.3:
        opening = ""  # a further turn of the conversation before it
    return Document(f"{opening}{USER}{question}{ASSISTANT}", f"{entry.definition}{EOS}")
