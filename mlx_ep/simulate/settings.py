"""What an instance's engine is told: defaults, flags, overrides of a cluster file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_ep.simulate.fields import Fields
from mlx_ep.simulate.model import ITEMSIZES

DTYPES = tuple(ITEMSIZES)
KV_DTYPES = ("auto", "fp8")
SCHEDULERS = ("vllm", "mlx_ep")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """EngineSettings of one engine, with vLLM's names and defaults.

    Attributes:
        scheduler: ``vllm``, or ``mlx_ep`` for this package's own server. The server has
            no token budget, no blocks (a quarter of the memory for KV caches keeps
            prefixes where `enable_prefix_caching`), and looks ahead where
            `async_scheduling`.
        prefill_step: tokens of prompts that the server processes beside a decoded one.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: of one step; 0: no limit.
        long_prefill_token_threshold: most prompt tokens of one request in a step; 0: no
            limit.
        block_size: tokens of a KV block.
        dtype: of weights and activations.
        kv_cache_dtype: ``auto``: as `dtype`.
        enable_chunked_prefill: a prompt may be cut to what is left of the step.
        enable_prefix_caching: blocks of known tokens are computed once.
        reserve_full_isl: a request is admitted where blocks for its whole prompt are
            free, not only for its first chunk.
        memory_utilization: part of the device memory that weights and blocks may take.
        skip_prefill: prompts are in the cache when they arrive; only decode is run.
        async_scheduling: the next step is scheduled while one runs, as vLLM does by
            default since 0.14.
        graphs: decode steps run as graphs captured for some batch sizes, padded to
            them, as vLLM does by default.
        placement_file: which rank has which experts: a file of `mlx_ep.placement`; "":
            contiguous.
        replica_memory: of each rank for copies of experts, such as "24GB"; "0": none.
    """

    scheduler: str = "vllm"
    prefill_step: int = 512
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    reserve_full_isl: bool = True
    memory_utilization: float | int = 0.9
    skip_prefill: bool = False
    async_scheduling: bool = True
    graphs: bool = True
    placement_file: str = ""
    replica_memory: str = "0"

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def kv_itemsize(self) -> int:
        return 1 if self.kv_cache_dtype == "fp8" else self.itemsize

    @property
    def token_budget(self) -> int:
        return self.max_num_batched_tokens or 1 << 60

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """StepBatch sizes with a graph: 1, 2, 4, eights to 256, sixteens beyond."""
        if not self.graphs:
            return ()
        most = min(2 * self.max_num_seqs, 512)
        sizes = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
        return tuple(size for size in sizes if size <= most)


def overridden(
    settings: EngineSettings, fields: Fields, memory: Fields
) -> EngineSettings:
    """The settings with what an instance and its `npu_mem` say.

    Raises:
        ValueError: which field is wrong.
    """
    util = memory.number("mem_util", settings.memory_utilization, above=0, most=1)
    return replace(
        settings,
        scheduler=fields.choice("scheduler", SCHEDULERS, settings.scheduler),
        prefill_step=fields.integer("prefill_step", settings.prefill_step, least=1),
        max_num_seqs=fields.integer("max_num_seqs", settings.max_num_seqs, least=1),
        max_num_batched_tokens=fields.integer(
            "max_num_batched_tokens", settings.max_num_batched_tokens
        ),
        long_prefill_token_threshold=fields.integer(
            "long_prefill_token_threshold", settings.long_prefill_token_threshold
        ),
        block_size=fields.integer("block_size", settings.block_size, least=1),
        dtype=fields.choice("dtype", DTYPES, settings.dtype),
        kv_cache_dtype=fields.choice(
            "kv_cache_dtype", KV_DTYPES, settings.kv_cache_dtype
        ),
        enable_chunked_prefill=fields.flag(
            "enable_chunked_prefill", settings.enable_chunked_prefill
        ),
        enable_prefix_caching=fields.flag(
            "enable_prefix_caching", settings.enable_prefix_caching
        ),
        reserve_full_isl=fields.flag("reserve_full_isl", settings.reserve_full_isl),
        memory_utilization=util,
        skip_prefill=fields.flag("skip_prefill", settings.skip_prefill),
        async_scheduling=fields.flag("async_scheduling", settings.async_scheduling),
        placement_file=_beside(fields, "expert_placement") or settings.placement_file,
        replica_memory=fields.text("replica_memory", settings.replica_memory),
    )


def _beside(fields: Fields, key: str) -> str:
    """The file that a field names, beside the cluster file or else from here; or ""."""
    if fields.value(key, None) is None:
        return ""
    name = fields.text(key)
    beside = Path(fields.file).parent / name
    return str(beside) if beside.is_file() else name
