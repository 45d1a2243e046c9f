"""Rank-local reading of checkpoints."""

from mlx_ep.loading.checkpoint import Checkpoint, TensorReader, read_config
from mlx_ep.loading.dense import (
    DensePart,
    Splitter,
    agree_attention,
    cluster_chips,
    decide,
    dense_part,
)
from mlx_ep.loading.foreign import foreign_code
from mlx_ep.loading.hub.fetch import DiskNeed, disk_problems
from mlx_ep.loading.identity import dense_facts, model_facts
from mlx_ep.loading.local import load_local, refuse_dense
from mlx_ep.loading.memory import (
    MemoryNeed,
    memory_limit,
    memory_problems,
    shortages,
    with_memory,
)
from mlx_ep.loading.progress import watch_phase
from mlx_ep.loading.rank_tensors import LoadBytes, RankTensor, load_bytes, rank_tensors
from mlx_ep.loading.shape import model_shape
from mlx_ep.loading.sizes import choose_placement, expert_sizes, held_bytes
from mlx_ep.loading.source import (
    EMBEDDED_MODEL,
    OVERLAY_FILE,
    find_model,
    has_tokenizer,
    hub_commit,
)
from mlx_ep.loading.weights import RankWeights, checkpoint_weights, dummy_weights
from mlx_ep.loading.widths import keep_part

__all__ = [
    "watch_phase",
    "DensePart",
    "Splitter",
    "agree_attention",
    "cluster_chips",
    "decide",
    "dense_part",
    "dense_facts",
    "model_facts",
    "EMBEDDED_MODEL",
    "OVERLAY_FILE",
    "Checkpoint",
    "DiskNeed",
    "LoadBytes",
    "MemoryNeed",
    "TensorReader",
    "RankTensor",
    "RankWeights",
    "rank_tensors",
    "checkpoint_weights",
    "choose_placement",
    "disk_problems",
    "dummy_weights",
    "expert_sizes",
    "find_model",
    "foreign_code",
    "has_tokenizer",
    "held_bytes",
    "hub_commit",
    "keep_part",
    "load_local",
    "memory_limit",
    "memory_problems",
    "model_shape",
    "load_bytes",
    "read_config",
    "refuse_dense",
    "shortages",
    "with_memory",
]
