"""The sizes of a model that a simulation needs, from its config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ep.simulate.fields import Fields, read_json

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1, "int8": 1}
# mlx-lm packs routers in 8 bits, in groups of 64, whatever the rest is packed in.
_PACKED_ROUTER = 1.0625
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The attention of DeepSeek (MLA): a token's keys and values come from one latent.

    Attributes:
        kv_rank, q_rank: of the latents of keys and values, and of queries; 0: queries
            have none.
        rope_width: of a key's part with the position, one for all heads.
        key_width, value_width: of a head, the key without that part.
    """

    kv_rank: int
    q_rank: int
    rope_width: int
    key_width: int
    value_width: int

    def weights(self, width: int, heads: int) -> int:
        """Numbers of the matrices of a layer."""
        query = heads * (self.key_width + self.rope_width)
        queries = width * query
        if self.q_rank:
            queries = self.q_rank * (width + query)
        inner = heads * (self.key_width + self.value_width)
        keys = width * (self.kv_rank + self.rope_width) + self.kv_rank * inner
        return queries + keys + heads * self.value_width * width


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A decoder with grouped-query attention or latents and, maybe, routed experts.

    Attributes:
        name: as the cluster file calls it.
        num_layers: all decoder layers; `num_moe_layers` of them with experts.
        width: D.
        num_heads, num_kv_heads, head_dim: of the attention.
        dense_width: of the feed-forward part of layers without experts.
        num_experts, top_k, expert_width: E, K, F; 0 where there are no experts.
        vocabulary: rows of the embedding and of the logits.
        is_tied: whether the two share their matrix.
        packed_bytes: of a number of a quantized matrix, its scales included; 0: the
            model is not quantized.
        config: all of config.json.
        latents: of the attention, where it has them; the widths of heads above are then
            not its own.
    """

    name: str
    num_layers: int
    num_moe_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dense_width: int
    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    vocabulary: int
    is_tied: bool
    packed_bytes: float | int
    config: dict[str, Any]
    latents: Latents | None = None

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def expert_weights(self) -> int:
        """Numbers of all routed experts."""
        each = 3 * self.width * self.expert_width
        return self.num_moe_layers * self.num_experts * each

    @property
    def gate_weights(self) -> int:
        """Numbers of all routers."""
        return self.num_moe_layers * self.num_experts * self.width

    @property
    def dense_weights(self) -> int:
        """Numbers of all matrices but experts and routers."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.width * self.head_dim * (heads + self.num_heads)
        if self.latents:
            attention = self.latents.weights(self.width, self.num_heads)
        without = self.num_layers - self.num_moe_layers
        return (
            self.vocabulary * self.width * (1 if self.is_tied else 2)
            + self.num_layers * attention
            + without * 3 * self.width * self.dense_width
            + self.num_moe_layers * 3 * self.width * self.shared_width
        )

    @property
    def norm_weights(self) -> int:
        """Numbers that are never packed."""
        return self.num_layers * 2 * (self.width + self.head_dim) + self.width

    def weight_bytes(
        self, tp: int, ep: int, pp: int, itemsize: int, slots: int | None = None
    ) -> int:
        """Bytes of weights on one device: dense / tp + experts / ep, routers whole.

        With pipeline stages a device holds its layers' part of each.

        Args:
            slots: experts of a layer that the fullest device has; None: E / ep.
        """
        packed: float = self.packed_bytes or itemsize
        router: float = _PACKED_ROUTER if self.packed_bytes else itemsize
        dense = self.dense_weights * packed + self.norm_weights * itemsize
        experts, gates = self.expert_weights * packed, self.gate_weights * router
        held = experts / ep if slots is None else experts * slots / self.num_experts
        return round((dense / tp + held + gates) / pp)

    def kv_token_bytes(self, itemsize: int) -> int:
        """Of what is kept of one token, of all layers."""
        if self.latents:
            kept = self.latents.kv_rank + self.latents.rope_width
            return self.num_layers * kept * itemsize
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def kv_split(self, tp: int) -> int:
        """How many devices share what is kept of a token: heads are split, latents are
        whole on each.
        """
        return 1 if self.latents else tp


def find_model(name: str, folders: Sequence[Path]) -> ModelSizes:
    """The model of a cluster file: ``<folder>/<name>.json`` or a folder's config.json.

    Raises:
        ValueError: there is none, or its sizes cannot be told.
    """
    tried = []
    for folder in folders:
        for file in (folder / f"{name}.json", folder / name / "config.json"):
            if file.is_file():
                return read_model(name, file)
            tried.append(str(file))
    raise ValueError(
        f"model_name {name!r} has no config: none of {', '.join(tried[:4])} is there. "
        "Say where they are with --model-dir."
    )


def read_model(name: str, file: Path) -> ModelSizes:
    """Raises:
    ValueError: the config does not say what is needed, or is of a kind not known.
    """
    content = read_json(file)
    fields = Fields(str(file), "", content)
    if fields.has("text_config"):
        fields = fields.object("text_config")
        content = content["text_config"]
    for key in ("index_topk", "linear_num_value_heads", "ssm_cfg"):
        if fields.has(key):
            raise fields.fail(
                key,
                "is of an attention that the simulator does not know; it knows "
                "grouped-query attention and latents.",
            )
    layers = fields.integer("num_hidden_layers", least=1)
    heads = fields.integer("num_attention_heads", least=1)
    width = fields.integer("hidden_size", least=1)
    keys = [key for key in _EXPERT_KEYS if fields.has(key)]
    experts = fields.integer(keys[0]) if keys else 0
    inner = fields.integer("intermediate_size", 0)
    expert_width = fields.integer("moe_intermediate_size", inner) if experts else 0
    top_k = fields.integer("num_experts_per_tok", least=1) if experts else 0
    if experts and (top_k > experts or not expert_width):
        raise fields.fail(
            "num_experts_per_tok",
            f"must be at most the {experts} experts, which need a "
            f"moe_intermediate_size; got {top_k} and {expert_width}.",
        )
    shared = fields.integer("n_shared_experts", 0) * expert_width
    return ModelSizes(
        name=name,
        num_layers=layers,
        num_moe_layers=_moe_layers(fields, layers) if experts else 0,
        width=width,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads, least=1),
        head_dim=fields.integer("head_dim", width // heads, least=1),
        dense_width=inner,
        num_experts=experts,
        top_k=top_k,
        expert_width=expert_width,
        shared_width=fields.integer("shared_expert_intermediate_size", shared),
        vocabulary=fields.integer("vocab_size", least=1),
        is_tied=fields.flag("tie_word_embeddings", False),
        packed_bytes=_packed(fields),
        config=content,
        latents=_latents(fields) if fields.has("kv_lora_rank") else None,
    )


def _latents(fields: Fields) -> Latents:
    return Latents(
        kv_rank=fields.integer("kv_lora_rank", least=1),
        q_rank=fields.integer("q_lora_rank", 0),
        rope_width=fields.integer("qk_rope_head_dim", least=1),
        key_width=fields.integer("qk_nope_head_dim", least=1),
        value_width=fields.integer("v_head_dim", least=1),
    )


def _packed(fields: Fields) -> float:
    """Bytes of a number by mlx-lm's `quantization`: bits, and scales per group."""
    if not fields.has("quantization"):
        return 0.0
    found = fields.object("quantization")
    bits = found.integer("bits", least=1)
    group = found.integer("group_size", 64, least=1)
    is_affine = found.text("mode", "affine") == "affine"
    return bits / 8 + (4 if is_affine else 1) / group


def _moe_layers(fields: Fields, layers: int) -> int:
    """How many layers have experts, by the keys that models use to say so."""
    dense = set(fields.value("mlp_only_layers", []))
    dense |= set(range(fields.integer("first_k_dense_replace", 0)))
    step = fields.integer("decoder_sparse_step", 1, least=1)
    found = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    if not found:
        raise fields.fail("decoder_sparse_step", "leaves no layer with experts.")
    return len(found)
