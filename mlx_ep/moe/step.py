"""What holds for one forward pass of all layers."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_ep.types import TokenCounts


@dataclass
class Step:
    """What holds for one step (one forward pass) of all layers.

    Attributes:
        tokens: T of every rank, where the caller has agreed on it.
        dropped_pairs: (token, expert) pairs of this rank beyond the capacity, so far.
        layer: the number in the model of the layer that is being called; -1: none.
        calls: layers of the model that were called so far, this one included.
        number: of the pass, from 0 on.
    """

    tokens: TokenCounts | None = None
    dropped_pairs: int = 0
    layer: int = -1
    calls: int = 0
    number: int = -1

    def enter(self, layer: int) -> None:
        """The layer of this number is called; a lower one than before begins anew."""
        if self.layer < 0 or layer <= self.layer:
            self.number += 1
        self.calls = self.calls + 1 if layer >= self.layer else 1
        self.layer = layer
