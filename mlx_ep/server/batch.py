"""The sequences that decode together, in mlx-lm's caches for batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32

from mlx_ep.loading.caches import leaf_caches


class DecodeBatch:
    """Sequences with their KV caches, one row each.

    Attributes:
        places: of the rows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._caches: list[Any] = []
        self.places: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Of the caches."""
        return sum(cache.nbytes for cache in leaf_caches(self._caches))

    def join(self, places: Sequence[int], caches: list[Any]) -> None:
        """Sequences join.

        Args:
            places: of them, none of which is in the batch.
            caches: for a batch of them, one for each layer.
        """
        if self._caches:
            for own, other in zip(self._caches, caches, strict=True):
                own.extend(other)
        else:
            self._caches = caches
        self.places.extend(places)

    def leave(self, places: Sequence[int]) -> None:
        """Sequences leave, those of them that are here."""
        keep = [row for row, place in enumerate(self.places) if place not in places]
        if len(keep) == len(self.places):
            return
        self.places = [self.places[row] for row in keep]
        if not keep:
            self._caches = []
        for cache in self._caches:
            cache.filter(keep)

    def extract(self, place: int) -> list[Any]:
        """The caches of one sequence, a copy."""
        row = self.places.index(place)
        return [cache.extract(row) for cache in self._caches]

    def logits(self, tokens: Int32[mx.array, " B"]) -> Float[mx.array, "B V"]:
        """Of what follows one more token of each sequence; not evaluated.

        Args:
            tokens: of the rows.
        """
        logits = self._model(tokens[:, None], cache=self._caches)
        return logits[:, -1, :]


def prefill(
    model: nn.Module, chunks: Sequence[list[int]], caches: Sequence[list[Any]]
) -> list[Any] | None:
    """Process parts of prompts in one pass of ``len(chunks) * longest`` tokens.

    Args:
        chunks: tokens of each sequence, at least one.
        caches: of each; where there is one sequence, they take the tokens, where there
            are more, they stay as they are.

    Returns:
        The caches of the batch; None where there is one sequence.
    """
    if len(chunks) == 1:
        model(mx.array(list(chunks)), cache=caches[0])
        # sync: one chunk at a time, so that memory stays bounded.
        mx.eval([cache.state for cache in caches[0]])
        return None
    longest = max(map(len, chunks))
    padding = [longest - len(chunk) for chunk in chunks]
    merged = merge(caches)
    if any(padding):
        for cache in merged:
            cache.prepare(lengths=[len(c) for c in chunks], right_padding=padding)
    padded = [chunk + [0] * more for chunk, more in zip(chunks, padding, strict=True)]
    model(mx.array(padded), cache=merged)
    # sync: likewise.
    mx.eval([cache.state for cache in merged])
    if any(padding):
        for cache in merged:
            cache.finalize()
    return merged


def merge(caches: Sequence[list[Any]]) -> list[Any]:
    """Caches of single sequences as caches of a batch, a copy."""
    return [layer[0].merge(list(layer)) for layer in zip(*caches, strict=True)]
