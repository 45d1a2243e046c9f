"""Tokens that a router sends to experts which are drawn at random.

The router's matrix has orthonormal rows, and a token is noise plus the sum of those
rows, weighted with the logits that it is to have. So the router of the measured block
computes what a model's does, and every arm takes the same experts: none is a near-tie,
which different kernels could round to different sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32

from mlx_ep.benchmark.shapes import LayerShape

# Logits of the experts that are chosen, and of the others: from, to.
CHOSEN, OTHERS = (4.0, 5.0), (-1.0, 1.0)


@dataclass(frozen=True)
class TokenSource:
    """Draws tokens and their experts; the same on every rank.

    Attributes:
        skew: expert popularity falls as ``1 / rank^skew``; 0 is uniform.
        seed: of the whole run.
    """

    shape: LayerShape
    dtype: mx.Dtype
    skew: float = 0.0
    seed: int = 0

    @cached_property
    def router(self) -> Float32[np.ndarray, "E D"]:
        """Orthonormal rows."""
        size = (self.shape.width, self.shape.num_experts)
        columns, _ = np.linalg.qr(self._random(0).standard_normal(size))
        return np.ascontiguousarray(columns.T, np.float32)

    def expert_ids(self, num_tokens: int, sample: int) -> Int32[np.ndarray, "T K"]:
        """K distinct experts per token.

        Each next one is drawn from those that are left, by popularity: the K largest
        of log-popularity plus Gumbel noise.
        """
        random = self._random(1, num_tokens, sample)
        num_experts = self.shape.num_experts
        popular = -self.skew * np.log(1 + self._random(2).permutation(num_experts))
        noise = random.gumbel(size=(num_tokens, num_experts))
        order = np.argsort(-(popular + noise), axis=1)
        return np.ascontiguousarray(order[:, : self.shape.top_k], np.int32)

    def tokens(
        self, expert_ids: Int32[np.ndarray, "T K"], sample: int
    ) -> Float[mx.array, "T D"]:
        """Tokens whose K best experts are those."""
        num_tokens = len(expert_ids)
        random = self._random(3, num_tokens, sample)
        logits = random.uniform(*OTHERS, (num_tokens, self.shape.num_experts))
        chosen = random.uniform(*CHOSEN, expert_ids.shape)
        np.put_along_axis(logits, expert_ids, chosen, axis=1)
        noise = self._noise(num_tokens)
        missing = logits.astype(np.float32) - noise @ self.router.T
        return mx.array(noise + missing @ self.router).astype(self.dtype)

    def _noise(self, num_tokens: int) -> Float32[np.ndarray, "T D"]:
        size = (num_tokens, self.shape.width)
        return self._random(4).standard_normal(size, np.float32)

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])
