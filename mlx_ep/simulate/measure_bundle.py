"""A bundle of this machine: the kernels of a model's layers, timed one by one.

As MLX runs them: a prompt's chunk and decoding sequences are calls of their own, so
that an entry of attention.csv with both is the sum of two.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.measure.timer import Timer
from mlx_ep.simulate.model import ModelSizes
from mlx_ep.simulate.times.bundle import VARIANTS

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SEQUENCES = (1, 2, 4, 8, 16, 32)
CHUNKS, BEFORE = (16, 64, 256), (0, 256, 1024)
DECODES, KEYS = (1, 2, 4, 8, 16), (16, 128, 512, 2048)
# Experts are alike, and only those that are used are read: more need no memory here.
MOST_EXPERTS = 16
QUICK = 3  # of each of these
HEADERS = {
    "dense": ("layer", "tokens", "time_us"),
    "per_sequence": ("layer", "sequences", "time_us"),
    "attention": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
    "moe": ("tokens", "activated_experts", "time_us"),
}
CsvRows = list[tuple[Any, ...]]
TimedLayer = Callable[[mx.array], Any]


def write_bundle(
    folder: Path,
    timer: Timer,
    model: ModelSizes,
    dtype: str,
    hardware: str,
    quick: bool = False,
) -> Path:
    """Measure and write ``<folder>/<hardware>/<model>/<variant>/tp1``.

    Args:
        timer: of one rank.
        model: its config says how matrices are packed.
        dtype: of activations, and of matrices that are not packed.
        quick: few points.

    Returns:
        The folder of the variant.
    """
    kernels = _Kernels(timer, model, getattr(mx, dtype))
    sizes = [TOKENS, SEQUENCES, CHUNKS, BEFORE, DECODES, KEYS]
    if quick:
        sizes = [points[:QUICK] for points in sizes]
    tokens, sequences, chunks, before, decodes, keys = sizes
    tables = {
        "dense": kernels.dense(tokens),
        "per_sequence": kernels.per_sequence(sequences),
        "attention": kernels.attention(chunks, before, decodes, keys),
    }
    if model.is_moe:
        tables["moe"] = kernels.experts(tokens)
    variant = folder / hardware / model.name / VARIANTS.get(dtype, dtype)
    (variant / "tp1").mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        file = variant / "tp1" / f"{name}.csv"
        with file.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(HEADERS[name])
            writer.writerows((*row[:-1], f"{row[-1] * 1e6:.3f}") for row in rows)
    lines = [
        f"hardware: {hardware}",
        f"model: {model.name}",
        f"dtype: {dtype}",
        "tp_degrees: [1]",
        f"mlx_version: {version('mlx')}",
        "note: medians of calls of their own, without what waiting for a call takes",
    ]
    (variant / "meta.yaml").write_text("\n".join(lines) + "\n")
    return variant


class _Kernels:
    """The layers of a model, each with random numbers, and their times in s."""

    def __init__(self, timer: Timer, model: ModelSizes, dtype: mx.Dtype) -> None:
        self._timer, self._model, self._dtype = timer, model, dtype
        self._packing: dict[str, Any] = dict(model.config.get("quantization", {}))
        self._wait = timer.typical(_wait)

    def dense(self, tokens: Sequence[int]) -> CsvRows:
        model, scale = self._model, mx.ones((self._model.width,), self._dtype)
        heads = model.num_heads + 2 * model.num_kv_heads
        inner = model.num_heads * model.head_dim
        head_scale = mx.ones((model.head_dim,), self._dtype)

        def norm(x: mx.array) -> mx.array:
            return mx.fast.rms_norm(x, scale, 1e-6)

        def heads_norm(x: mx.array) -> mx.array:
            return mx.fast.rms_norm(x, head_scale, 1e-6)

        def rotate(x: mx.array) -> mx.array:
            return mx.fast.rope(
                x, model.head_dim, traditional=False, base=1e4, scale=1.0, offset=0
            )

        embedding = self._layer(nn.Embedding(model.vocabulary, model.width))
        both = (model.num_heads + model.num_kv_heads, model.head_dim)
        layers: dict[str, tuple[TimedLayer, Callable[[int], mx.array]]] = {
            "embedding": (embedding, lambda t: mx.arange(t) % model.vocabulary),
            "layernorm": (norm, self._rows(model.width)),
            "qkv_proj": (
                self._linear(model.width, heads * model.head_dim),
                self._rows(model.width),
            ),
            "qk_norm": (heads_norm, self._rows(*both)),
            "rotary_emb": (
                lambda x: rotate(x.swapaxes(0, 1)[None]),
                self._rows(*both),
            ),
            "o_proj": (self._linear(inner, model.width), self._rows(inner)),
            "final_layernorm": (norm, self._rows(model.width)),
        }
        if model.num_moe_layers < model.num_layers:
            width = model.dense_width
            layers["gate_up_proj"] = (
                self._linear(model.width, 2 * width),
                self._rows(model.width),
            )
            layers["act_fn"] = (
                lambda x: nn.silu(x[:, :width]) * x[:, width:],
                self._rows(2 * width),
            )
            layers["down_proj"] = (
                self._linear(width, model.width),
                self._rows(width),
            )
        found: CsvRows = []
        for name, (layer, make) in layers.items():
            found += [(name, t, s) for t, s in self._series(layer, make, tokens)]
        return found

    def per_sequence(self, sequences: Sequence[int]) -> CsvRows:
        model = self._model
        head = self._linear(model.width, model.vocabulary)
        found = [
            ("lm_head", n, s)
            for n, s in self._series(head, self._rows(model.width), sequences)
        ]

        def sample(x: mx.array) -> mx.array:
            return mx.argmax(x, axis=-1)

        rows = self._rows(model.vocabulary)
        found += [("sampler", n, s) for n, s in self._series(sample, rows, sequences)]
        return found

    def attention(
        self,
        chunks: Sequence[int],
        before: Sequence[int],
        decodes: Sequence[int],
        keys: Sequence[int],
    ) -> CsvRows:
        prompts = {
            (chunk, behind): self._scores(1, chunk, behind + chunk)
            for chunk in chunks
            for behind in before
        }
        singles = {(n, k): self._scores(n, 1, k) for n in decodes for k in keys}
        found: CsvRows = [(0, 0, n, k, s) for (n, k), s in singles.items()]
        for (chunk, behind), prompt in prompts.items():
            found.append((chunk, behind, 0, 0, prompt))
            found += [
                (chunk, behind, n, k, prompt + s) for (n, k), s in singles.items()
            ]
        return found

    def _scores(self, sequences: int, queries: int, keys: int) -> float:
        model = self._model
        q = self._random(sequences, model.num_heads, queries, model.head_dim)
        kv = self._random(sequences, model.num_kv_heads, keys, model.head_dim)

        def run(x: mx.array) -> mx.array:
            return mx.fast.scaled_dot_product_attention(
                x,
                kv,
                kv,
                scale=model.head_dim**-0.5,
                mask="causal" if queries > 1 else None,
            )

        return self._seconds(run, q)

    def experts(self, tokens: Sequence[int]) -> CsvRows:
        """T tokens that take K experts each, out of so many different ones."""
        model = self._model
        held = min(model.num_experts, max(MOST_EXPERTS, model.top_k))
        switch = self._layer(SwitchGLU(model.width, model.expert_width, held))
        found: CsvRows = []
        activated = sorted({model.top_k, *(2**i for i in range(1, 20)), held})
        for count in (n for n in activated if model.top_k <= n <= held):

            def run(x: mx.array, count: int = count) -> mx.array:
                pairs = mx.arange(x.shape[0] * model.top_k) % count
                ids = pairs.reshape(x.shape[0], model.top_k)
                return switch(x, ids).sum(axis=-2)

            several = [t for t in tokens if t * model.top_k >= count]
            found += [
                (t, count, s)
                for t, s in self._series(run, self._rows(model.width), several)
            ]
        return sorted(found)

    def _series(
        self, layer: TimedLayer, make: Callable[[int], mx.array], sizes: Sequence[int]
    ) -> list[tuple[int, float]]:
        calls = [(float(size), _evaluated(layer, make(size))) for size in sizes]
        return [(int(n), self._above(s)) for n, s in self._timer.series(calls)]

    def _seconds(self, layer: TimedLayer, x: mx.array) -> float:
        return self._above(self._timer.typical(_evaluated(layer, x)))

    def _above(self, seconds: float) -> float:
        """Without what any evaluation takes; noise must not leave nothing."""
        return max(seconds - self._wait, seconds / 10)

    def _rows(self, *shape: int) -> Callable[[int], mx.array]:
        return lambda count: self._random(count, *shape)

    def _random(self, *shape: int) -> mx.array:
        x = mx.random.normal(shape, key=mx.random.key(0)).astype(self._dtype)
        # sync: what is timed must not include making its arguments.
        mx.eval(x)
        return x

    def _linear(self, inputs: int, outputs: int) -> nn.Module:
        return self._layer(nn.Linear(inputs, outputs, bias=False))

    def _layer(self, module: nn.Module) -> nn.Module:
        """Packed as the model's matrices are."""
        module.set_dtype(self._dtype)
        if self._packing:
            options = {k: self._packing[k] for k in ("group_size", "bits", "mode")
                       if k in self._packing}  # fmt: skip
            holder = nn.Sequential(module)
            nn.quantize(holder, **options)
            module = holder.layers[0]
        # sync: what is timed must not include making its arguments.
        mx.eval(module.parameters())
        return module


def _evaluated(layer: TimedLayer, x: mx.array) -> Callable[[], None]:
    def run() -> None:
        # sync: this is what is timed.
        mx.eval(layer(x))

    return run


def _wait() -> None:
    # sync: this is what is timed.
    mx.eval(mx.ones((1,)) + 1)
