"""Rank-local reading of checkpoints."""

from mlx_ep.loading.checkpoint import Checkpoint, TensorReader, read_config
from mlx_ep.loading.dummy import held_bytes
from mlx_ep.loading.local import load_local
from mlx_ep.loading.plan import (
    LoadPlan,
    MemoryNeed,
    memory_limit,
    memory_problems,
    plan_load,
)
from mlx_ep.loading.source import EMBEDDED_MODEL, find_model, has_tokenizer
from mlx_ep.loading.weights import Weights, checkpoint_weights, dummy_weights

__all__ = [
    "EMBEDDED_MODEL",
    "Checkpoint",
    "LoadPlan",
    "MemoryNeed",
    "TensorReader",
    "Weights",
    "checkpoint_weights",
    "dummy_weights",
    "find_model",
    "has_tokenizer",
    "held_bytes",
    "load_local",
    "memory_limit",
    "memory_problems",
    "plan_load",
    "read_config",
]
