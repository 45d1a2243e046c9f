"""Placement files: which rank holds which expert, written down.

    {
      "format": "mlx_ep placement",
      "version": 1,
      "experts": 8,
      "ranks": [["0-3", 6], ["4-5"], [7]]
    }

`ranks` has one list per rank, in slot order: numbers of experts, or a text
"first-last" for consecutive ones, both included. An expert may be on several ranks,
which then hold copies of it. It holds for every MoE layer, unless there is "layers",
a list with one such list for each of them: then "ranks" is what a checkpoint is read
by, and experts move to the places in "layers" when that is done.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_ep.placement.parts import runs
from mlx_ep.placement.placement import Placement

FORMAT = "mlx_ep placement"
VERSION = 1

_RANGE = re.compile(r"(\d+)-(\d+)")


def read_placement(path: str | Path, num_experts: int, num_ranks: int) -> Placement:
    """The placement of a file, for a model and a number of ranks.

    Raises:
        ValueError: the file cannot be read, is of another format or version, is for
            another number of experts or ranks, lacks an expert or has one twice on a
            rank.
    """
    content = _read_json(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(
            f'{path} must say "format": "{FORMAT}" and "version": {VERSION}; it says '
            f"{content.get('format')!r} and {content.get('version')!r}."
        )
    known = {"format", "version", "experts", "ranks", "layers"}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{path} has keys that are not known: {', '.join(unknown)}.")
    if content.get("experts") != num_experts:
        raise ValueError(
            f"{path} must be for the model's {num_experts} experts per layer; its "
            f'"experts" is {content.get("experts")!r}.'
        )
    base = _ranks_of(path, content.get("ranks"), num_experts, num_ranks)
    layers = content.get("layers", [])
    if not isinstance(layers, list):
        raise ValueError(f'{path}: "layers" must be a list with one entry per layer.')
    made = [_ranks_of(path, ranks, num_experts, num_ranks) for ranks in layers]
    return Placement(base, layers=tuple(map(Placement, made)))


def _ranks_of(
    path: str | Path, ranks: Any, num_experts: int, num_ranks: int
) -> tuple[tuple[int, ...], ...]:
    """The experts of each rank, from "ranks" or an entry of "layers"."""
    if not isinstance(ranks, list) or not all(isinstance(r, list) for r in ranks):
        raise ValueError(f'{path}: "ranks" must be a list with one list per rank.')
    if len(ranks) != num_ranks:
        raise ValueError(
            f"{path} is for {len(ranks)} ranks; this run has {num_ranks}. Start as "
            "many, or write a placement for them."
        )
    found = tuple(
        tuple(e for entry in entries for e in _experts(path, entry, num_experts))
        for entries in ranks
    )
    _check_held(path, found, num_experts)
    return found


def write_placement(path: str | Path, placement: Placement) -> None:
    """Write a placement of whole experts as `read_placement` reads it.

    Raises:
        ValueError: ranks share the width of experts, which the format cannot say.
    """
    if placement.parts is not None:
        raise ValueError(
            "A placement file says which rank holds which expert; it cannot say how "
            "ranks share the width of experts. Give --ep to the run instead."
        )
    content = {
        "format": FORMAT,
        "version": VERSION,
        "experts": placement.num_experts,
        "ranks": _entries(placement),
    }
    if placement.layers:
        content["layers"] = [_entries(layer) for layer in placement.layers]
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def _entries(placement: Placement) -> list[list[str | int]]:
    return [
        [f"{first}-{first + n - 1}" if n > 1 else first for first, n in runs(experts)]
        for experts in placement.rank_experts
    ]


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"The placement file {path} cannot be read here: {error.strerror}. Every "
            "rank reads its own copy: put it on every host, at the same path."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def _experts(path: str | Path, entry: Any, num_experts: int) -> range:
    match = _RANGE.fullmatch(entry) if isinstance(entry, str) else None
    if match is not None:
        first, last = int(match[1]), int(match[2])
    else:
        is_number = isinstance(entry, int) and not isinstance(entry, bool)
        first = last = entry if is_number else -1
    if not 0 <= first <= last < num_experts:
        raise ValueError(
            f"{path}: an entry must be an expert's number, 0 to {num_experts - 1}, or "
            f'a text "first-last" of two of them; got {entry!r}.'
        )
    return range(first, last + 1)


def _check_held(
    path: str | Path, ranks: tuple[tuple[int, ...], ...], num_experts: int
) -> None:
    held = {expert for experts in ranks for expert in experts}
    if missing := sorted(set(range(num_experts)) - held):
        raise ValueError(
            f"{path} must hold each of the experts 0..{num_experts - 1}; "
            f"{len(missing)} are missing: {_some(missing)}."
        )
    for rank, experts in enumerate(ranks):
        counts = Counter(experts)
        if twice := sorted(e for e, n in counts.items() if n > 1):
            raise ValueError(
                f"{path} must hold an expert at most once on a rank; rank {rank} has "
                f"more than once: {_some(twice)}."
            )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." * (len(numbers) > 8))
