"""What a decoder layer takes beside its matrices: layers of mlx-lm without them.

Single queries read the caches of a batch, as in a decode step: there are no rows that a
matrix product could share a key among, and their scores have a softmax each. As in
`mlx_ep.measure.costs`, every function must be called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from mlx_lm.models.cache import BatchKVCache

from mlx_ep.measure.costs import sizes
from mlx_ep.measure.timer import Timer

LAYERS = 4  # one after another, each with a cache of its own
SEQUENCES = 16  # with a single query each
PARTS = 4  # prompts of as many tokens together as the long one
FEW_KEYS = 64
NARROW, WIDE = 32, 128  # heads, which tell apart scores and what grows with their width
GROUPED = 4  # queries of a key
_STEP = BatchKVCache.step  # tokens by which mlx-lm's caches grow


class _Case(NamedTuple):
    """`sequences` with `queries` more tokens each, behind `before` others."""

    head: int
    sequences: int
    queries: int
    before: int

    @property
    def seen(self) -> int:
        """Pairs of a query and a key that it sees."""
        each = self.queries * self.before + self.queries * (self.queries + 1) // 2
        return self.sequences * each

    @property
    def unseen(self) -> int:
        """Pairs of a query and a key of a later token of the same step."""
        return self.sequences * (self.queries * (self.queries - 1) // 2)


class _First(nn.Module):
    """In place of a matrix: the first numbers of a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def __call__(self, x: mx.array) -> mx.array:
        return x[..., : self._width]


def layer_times(timer: Timer, width: int, dtype: mx.Dtype) -> dict[str, float]:
    """`attention_rate`, `unseen_seconds`, `query_seconds`, `score_seconds`,
    `prompt_score_seconds` and `element_seconds` of a profile.

    A layer takes, for its queries, pairs of a query and a key, and H heads,

        call + queries * D * element + pairs * (2 * D * mac + H * score)

    where a mac of a single query, of a prompt, and with a key that is not seen take
    times of their own, and a score of a single query and of a prompt, which is masked.
    Cases of which two differ in one of these tell them apart.

    Args:
        width: D, a multiple of 64.
    """
    wide = min(WIDE, width)
    narrow = min(NARROW, wide // 2)
    amounts = sizes()
    few = {head: _Case(head, SEQUENCES, 1, FEW_KEYS) for head in (narrow, wide)}
    many = {head: _Case(head, SEQUENCES, 1, amounts.keys) for head in (narrow, wide)}
    length = amounts.queries
    prompts = {head: _Case(head, 1, length, 0) for head in (narrow, wide)}
    behind = {head: _Case(head, 1, length, length) for head in (narrow, wide)}
    prompt = prompts[wide]
    parts = _Case(wide, PARTS, length // PARTS, 0)
    short = _Case(wide, SEQUENCES, length // SEQUENCES, 0)
    pairs_of = (few, many, prompts, behind)
    cases = [case for pair in pairs_of for case in pair.values()] + [parts, short]
    layers = {head: bare_layers(width, head, dtype) for head in (narrow, wide)}
    steps = timer.longer().together(
        {case: _step(layers[case.head], case, dtype) for case in cases}
    )
    found = {case: seconds / LAYERS for case, seconds in steps.items()}

    def per_pair(more: _Case, less: _Case) -> float:
        return max(0.0, found[more] - found[less]) / (more.seen - less.seen)

    single = {head: per_pair(many[head], few[head]) for head in (narrow, wide)}
    seen_by = {head: per_pair(behind[head], prompts[head]) for head in (narrow, wide)}
    # Both heads multiply as many numbers; narrow ones have more scores.
    heads = width // wide
    score, prompt_score = (
        max(0.0, found_by[narrow] - found_by[wide]) / (width // narrow - heads)
        for found_by in (single, seen_by)
    )
    seen = seen_by[wide]
    hidden = found[prompt] - found[parts] - (prompt.seen - parts.seen) * seen
    hidden = max(0.0, hidden) / (prompt.unseen - parts.unseen)
    # Short prompts and single queries differ in how many there are.
    pairs = short.seen * seen + short.unseen * hidden
    rows = found[short] - pairs - found[few[wide]] + few[wide].seen * single[wide]

    def per_mac(seconds: float, score: float) -> float:
        # Noise must not leave nothing.
        return max(seconds - heads * score, seconds / 10, 1e-15) / (2 * width)

    return {
        "attention_rate": 2 / per_mac(seen, prompt_score),
        "unseen_seconds": per_mac(hidden, prompt_score),
        "query_seconds": per_mac(single[wide], score),
        "score_seconds": score,
        "prompt_score_seconds": prompt_score,
        "element_seconds": max(0.0, rows) / (length - SEQUENCES) / width,
    }


def bare_layers(width: int, head: int, dtype: mx.Dtype) -> list[nn.Module]:
    """Decoder layers of mlx-lm whose matrices are left out."""
    heads = width // head
    keys = max(1, heads // GROUPED)
    args = qwen3.ModelArgs(
        model_type="qwen3",
        hidden_size=width,
        num_hidden_layers=LAYERS,
        intermediate_size=64,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head,
        rms_norm_eps=1e-6,
        vocab_size=64,
        max_position_embeddings=4096,
        rope_theta=1e4,
        tie_word_embeddings=True,
    )
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layer = qwen3.TransformerBlock(args)
        layer.mlp = _First(width)
        attention = layer.self_attn
        attention.q_proj = attention.o_proj = _First(width)
        attention.k_proj = attention.v_proj = _First(keys * head)
        layer.set_dtype(dtype)
        layers.append(layer)
    return layers


def _step(
    layers: Sequence[nn.Module], case: _Case, dtype: mx.Dtype
) -> Callable[[], None]:
    """A call that takes the tokens of a case; its caches are then as they were."""
    sequences, queries, before = case[1:]
    caches = []
    for layer in layers:
        cache = BatchKVCache([0] * sequences)
        # Room for all of it, so that no cache grows while it is timed.
        held = -(-(before + queries) // _STEP) * _STEP
        shape = (sequences, layer.self_attn.n_kv_heads, held, case.head)
        cache.update_and_fetch(*(mx.zeros(shape, dtype) for _ in range(2)))
        cache.trim(held - before)
        caches.append(cache)
    x = mx.random.normal((sequences, queries, layers[0].hidden_size)).astype(dtype)
    # sync: what is timed must not include making its arguments.
    mx.eval(x, [cache.state for cache in caches], [v.parameters() for v in layers])

    def run() -> None:
        mask = caches[0].make_mask(queries)
        h = x
        for layer, cache in zip(layers, caches, strict=True):
            h = layer(h, mask, cache)
        # sync: this is what is timed.
        mx.eval(h)
        for cache in caches:
            cache.trim(queries)

    return run
