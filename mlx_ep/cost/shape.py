"""What the cost model knows of a layer and of a model: counts, no weights.

Pure. `mlx_ep.loading.model_shape` fills a `ModelShape` from a config.json; the letters
are those of `mlx_ep.types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from mlx_ep.types import Packing

Shape = TypeVar("Shape", "MatrixTotal", "LayerShape", "ModelShape")


@dataclass(frozen=True)
class MatrixTotal:
    """Matrices that every token passes: how many numbers, in how many bytes.

    Attributes:
        weights: numbers, of all matrices together.
        num_bytes: what holding them takes, scales and offsets included.
        split_weights: of these numbers, those that mlx-lm's `shard()` splits over the
            ranks; the others it leaves whole on each.
    """

    weights: int = 0
    num_bytes: int = 0
    split_weights: int = 0

    def __add__(self, other: MatrixTotal) -> MatrixTotal:
        return MatrixTotal(
            self.weights + other.weights,
            self.num_bytes + other.num_bytes,
            self.split_weights + other.split_weights,
        )

    def on_rank(self, num_ranks: int) -> MatrixTotal:
        """What one rank has under tensor parallelism."""
        if not self.weights:
            return self
        kept = self.weights - self.split_weights * (1 - 1 / num_ranks)
        return MatrixTotal(
            round(kept),
            round(self.num_bytes * kept / self.weights),
            round(self.split_weights / num_ranks),
        )


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One MoE layer.

    Attributes:
        num_experts: E.
        width: D.
        expert_width: F.
        top_k: K.
        expert_bytes: of one expert, scales and offsets included.
        packing: of its matrices.
        itemsize: bytes of one number of a token.
        num_matrices: of one expert; 3 for SwiGLU (gate, up, down).
        shared: the shared experts and their gate.
        router: the router's matrix.
        name: for a person.
    """

    num_experts: int
    width: int
    expert_width: int
    top_k: int
    expert_bytes: int
    packing: Packing
    itemsize: int = 2
    num_matrices: int = 3
    shared: MatrixTotal = MatrixTotal()
    router: MatrixTotal = MatrixTotal()
    name: str = ""

    def __post_init__(self) -> None:
        for key in ("num_experts", "width", "expert_width", "top_k", "expert_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be 1 or more; got {getattr(self, key)}.")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts={self.num_experts}; got "
                f"{self.top_k}."
            )

    @property
    def expert_weights(self) -> int:
        """Numbers of one expert."""
        return self.num_matrices * self.width * self.expert_width

    @property
    def bytes_per_weight(self) -> float:
        return self.expert_bytes / self.expert_weights

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "packing": str(self.packing)}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model with MoE layers; sums are over all its layers.

    Attributes:
        layer: one of its MoE layers (they are taken to be alike).
        num_layers: all decoder layers.
        num_moe_layers: those with routed experts.
        attention: projections of the attention.
        dense: feed-forward matrices of the layers without experts.
        head: what makes logits.
        dense_packing: how `attention`, `dense` and `head` are packed (most of them).
        kv_bytes: of the KV cache, for each token of context.
        kv_is_split: whether `shard()` splits the KV cache over the ranks (heads do, the
            latents of MLA do not).
        state_bytes: of caches that do not grow with the context.
        attention_macs: multiply-adds of scores and of values for one query and one key:
            heads x (key width + value width), over all layers.
        attention_scores: of one query and one key: heads, over all layers; 0: not said.
        window: the most keys that some layers attend to; 0: there are none.
        window_kv_bytes: of `kv_bytes`, those of layers with the window.
        window_macs: of `attention_macs`, likewise.
        has_shard: whether mlx-lm's model file has tensor parallelism, `shard()`.
        name: for a person.
    """

    layer: LayerShape
    num_layers: int
    num_moe_layers: int
    attention: MatrixTotal
    dense: MatrixTotal = MatrixTotal()
    head: MatrixTotal = MatrixTotal()
    dense_packing: Packing = Packing.plain("bfloat16")  # noqa: RUF009, it is frozen
    kv_bytes: int = 0
    kv_is_split: bool = True
    state_bytes: int = 0
    attention_macs: int = 0
    attention_scores: int = 0
    window: int = 0
    window_kv_bytes: int = 0
    window_macs: int = 0
    has_shard: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.num_moe_layers <= self.num_layers:
            raise ValueError(
                f"num_moe_layers must be 1 to num_layers={self.num_layers}; got "
                f"{self.num_moe_layers}."
            )
        for name, most in (
            ("window_kv_bytes", self.kv_bytes),
            ("window_macs", self.attention_macs),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be between 0 and {most}, the bytes or multiply-adds "
                    f"of all layers; got {getattr(self, name)}."
                )

    @property
    def expert_bytes(self) -> int:
        """Of all routed experts."""
        return self.num_moe_layers * self.layer.num_experts * self.layer.expert_bytes

    @property
    def dense_bytes(self) -> int:
        """Of all matrices that every token passes."""
        each = self.layer.shared.num_bytes + self.layer.router.num_bytes
        return (
            self.attention.num_bytes
            + self.dense.num_bytes
            + self.head.num_bytes
            + self.num_moe_layers * each
        )

    @property
    def num_bytes(self) -> int:
        """Of the whole model, without the table of embeddings and vectors."""
        return self.expert_bytes + self.dense_bytes

    def held_bytes(self, arm: str, num_ranks: int) -> int:
        """Bytes of weights that one rank holds under an arm of `mlx_ep.cost.step`.

        Experts split as evenly as they go, the rank with the most of them counts.
        """
        if arm == "single" or num_ranks == 1:
            return self.num_bytes
        if arm == "tp":
            layer, moe = self.layer, self.num_moe_layers
            split = self.attention + self.dense + _times(layer.shared, moe)
            whole = self.head.num_bytes + moe * layer.router.num_bytes
            return (
                self.expert_bytes // num_ranks
                + split.on_rank(num_ranks).num_bytes
                + whole
            )
        own = -(-self.layer.num_experts // num_ranks)
        experts = self.num_moe_layers * own * self.layer.expert_bytes
        dense = self.dense_bytes
        if arm == "ep-tensor":
            dense -= self.attention.num_bytes
            dense += self.attention.on_rank(num_ranks).num_bytes
        return experts + dense

    def cache_bytes(self, context: float | int) -> float | int:
        """Of the caches of one sequence with so many tokens."""
        seen = min(context, self.window)
        whole = self.kv_bytes - self.window_kv_bytes
        return whole * context + self.window_kv_bytes * seen + self.state_bytes

    def scores_macs(self, context: float | int) -> float | int:
        """Multiply-adds of the attention for one query that sees so many keys."""
        seen = min(context, self.window)
        return (self.attention_macs - self.window_macs) * context + (
            self.window_macs * seen
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "layer": self.layer.to_json(),
            "dense_packing": str(self.dense_packing),
        }


def layer_from_json(content: Mapping[str, Any]) -> LayerShape:
    """The record of `LayerShape.to_json`.

    Raises:
        ValueError: a field is unknown or missing.
    """
    nested = {name: _matrices(content, name) for name in ("shared", "router")}
    return _record(LayerShape, {**content, **nested, **_packing(content, "packing")})


def model_from_json(content: Mapping[str, Any]) -> ModelShape:
    """The record of `ModelShape.to_json`.

    Raises:
        ValueError: a field is unknown or missing.
    """
    if not isinstance(content.get("layer"), Mapping):
        raise ValueError("A model's shape must hold its layer's, under 'layer'.")
    nested = {name: _matrices(content, name) for name in ("attention", "dense", "head")}
    layer = layer_from_json(content["layer"])
    packing = _packing(content, "dense_packing")
    return _record(ModelShape, {**content, **nested, **packing, "layer": layer})


def _packing(content: Mapping[str, Any], name: str) -> dict[str, Packing]:
    return {name: Packing.parse(content[name])} if name in content else {}


def _matrices(content: Mapping[str, Any], name: str) -> MatrixTotal:
    found = content.get(name, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} must hold weights and num_bytes; got {found!r}.")
    return _record(MatrixTotal, found)


def _record(kind: type[Shape], content: Mapping[str, Any]) -> Shape:
    known = [f.name for f in fields(kind)]
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(
            f"A {kind.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}."
        )
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"A {kind.__name__} lacks values: {error}.") from error


def _times(matrices: MatrixTotal, count: int) -> MatrixTotal:
    return MatrixTotal(
        count * matrices.weights,
        count * matrices.num_bytes,
        count * matrices.split_weights,
    )


# (E, D, F, K) of one MoE layer, from the models' config.json files.
NAMED_LAYERS = {
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "qwen3-235b": (128, 4096, 1536, 8),
    "deepseek-v3": (256, 7168, 2048, 8),
    "kimi-k2": (384, 7168, 2048, 8),
    "glm-4.6": (160, 5120, 1536, 8),
    "gpt-oss-120b": (128, 2880, 2880, 4),
    "mixtral-8x7b": (8, 4096, 14336, 2),
}


def named_layer(
    name: str,
    packing: Packing | None = None,
    *,
    scale: int = 1,
    itemsize: int = 2,
) -> LayerShape:
    """The MoE layer of a known model, or of "E,D,F,K"; without its shared experts.

    Args:
        name: in `NAMED_LAYERS`, or four numbers.
        packing: of the experts; None: affine, 4 bit in groups of 64.
        scale: D and F are divided by it; they stay multiples of the group.
        itemsize: bytes of one number of a token.

    Raises:
        ValueError: there is no such name, or the scaled widths do not fit.
    """
    packing = packing or Packing.affine(4)
    numbers = NAMED_LAYERS.get(name)
    if numbers is None:
        parts = name.split(",")
        if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
            raise ValueError(
                f"A layer's shape must be one of {', '.join(NAMED_LAYERS)}, or four "
                f"numbers E,D,F,K; got {name!r}."
            )
        num_experts, width, expert_width, top_k = (int(part) for part in parts)
    else:
        num_experts, width, expert_width, top_k = numbers
    group = packing.group_size or 1
    if width % (scale * group) or expert_width % (scale * group):
        raise ValueError(
            f"D={width} and F={expert_width} over scale={scale} must be multiples "
            f"of the packing's group of {group}; choose another scale or group size."
        )
    width, expert_width = width // scale, expert_width // scale
    return LayerShape(
        name=name if scale == 1 else f"{name}/{scale}",
        num_experts=num_experts,
        width=width,
        expert_width=expert_width,
        top_k=top_k,
        expert_bytes=packing.num_bytes(3 * width * expert_width),
        packing=packing,
        itemsize=itemsize,
        router=MatrixTotal(num_experts * width, num_experts * width * itemsize),
    )
