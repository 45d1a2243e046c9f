"""The one configuration record. Its fields are the defaults of every command."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal, get_args

# The strategies of this package; `STRATEGIES.register` adds others.
StrategyName = Literal["replicated", "gathered", "all_to_all", "auto"]
Mode = Literal["auto", "low_latency", "normal"]
Sums = Literal["model", "float32"]
Reduction = Literal["partial_sum", "per_slot"]
SharedRouting = Literal["auto", "always", "never"]
Attention = Literal["replicated", "tensor", "auto"]
Runner = Literal["auto", "gather", "blas", "metal"]
Backend = Literal["auto", "cpu", "metal"]
Download = Literal["ranges", "full"]

# What SGLang, DeepEP, vLLM and InfiniLM call them -> (strategy, mode).
ALIASES: dict[str, tuple[str, Mode | None]] = {
    "none": ("replicated", None),
    "disabled": ("replicated", None),
    "local_allreduce": ("replicated", None),
    "tp_ep": ("replicated", None),
    "allgather_reducescatter": ("gathered", None),
    "ag_rs": ("gathered", None),
    "naive": ("gathered", None),
    "deepep": ("all_to_all", None),
    "low_latency": ("all_to_all", "low_latency"),
    "normal": ("all_to_all", "normal"),
}


@dataclass(frozen=True, kw_only=True)
class EPConfig:
    """How a model is made expert-parallel.

    Attributes:
        strategy: how tokens meet experts. ``replicated``: every rank holds the same
            tokens, runs its own slots and one all_sum per MoE layer completes the
            sum. The others are for ranks with tokens of their own. ``gathered``:
            all_gather of the tokens, reduce_scatter of the sums. ``all_to_all``: a
            row travels to a rank that needs it, and its sum back. ``auto``: one of
            these two, see `mlx_ep.exchange.auto`. The names in `ALIASES` are taken
            too and replaced by these.
        mode: of ``all_to_all``. ``low_latency``: shapes fixed by
            `low_latency_tokens`, no host sync. ``normal``: the routing first, then
            exactly the rows that are needed. ``auto``: low_latency where the tokens
            fit, else normal.
        low_latency_tokens: most tokens of one rank in mode ``low_latency``.
        round_tokens: most tokens of one rank that are exchanged at once in the other
            sharded strategies; longer prompts go in rounds, so that the buffers do
            not grow with them.
        sums: what the sums of ``all_to_all`` travel back in. ``model``: the dtype of
            the tokens, each rank's sum rounded once. ``float32``: not rounded, for
            twice the bytes of a bfloat16 model.
        capacity: None drops nothing. A number C keeps, of the pairs of one rank's
            tokens and one expert, the first C (all first choices come before all
            second choices); the others contribute 0, are counted and warned of.
        reduction: what that all_sum carries. ``partial_sum``: ``[T, D]`` float32,
            each rank's gate-weighted sum. ``per_slot``: ``[T, K, D]`` in the model's
            dtype, K times the bytes; the model then sums them itself, which is
            bit-identical to one process. For debugging, and what a block falls
            back to that is neither ``routed`` nor ``partial-sum``, see
            docs/models.md.
        shared_routing: whether rank 0's routing is sent to all ranks, one more
            collective per MoE layer. Needed where ranks may round differently and so
            choose different experts at a near-tie; ``auto`` turns it on where the
            ranks' chips or MLX versions differ.
        attention: how the dense part runs, with strategy ``replicated``.
            ``replicated``: whole on every rank. ``tensor``: split over the ranks by the
            model's own ``shard()``, for one more collective per layer; the KV cache is
            split too where it holds heads. ``auto``: the one of these that fits and is
            predicted to be faster, see `mlx_ep.cost.attention`.
        runner: what runs a rank's experts. ``gather``: MLX's gather_mm and gather_qmm.
            ``blas``: NumPy on the CPU. ``metal``: this package's kernels for decode.
            ``auto``: for each call the fastest that is right, see `mlx_ep.tune`.
        backend: what computes the experts and moves their rows; the environment
            variable MLX_EP_BACKEND of rank 0 goes first.
        warmup: whether the ways to run experts and, where there is Metal, those to
            move their rows are checked and timed when the model
            is made expert-parallel (a fraction of a second for each shape of layer,
            then remembered); without it, a rule decides between them.
        memory_limit_gb: most GB (10^9 bytes) of weights this rank may hold; None is
            what the device recommends (Metal) or the host has available (CPU).
        memory: GB (10^9 bytes) that each rank may hold, in rank order: experts are
            shared out in proportion to what the dense weights leave of it. None:
            every rank gets the same number of experts.
        context: tokens of a sequence whose KV cache and computation have to fit into
            `memory` too.
        placement_file: a file that says which rank holds which expert, see
            `mlx_ep.placement.file`. Every rank reads its own copy.
        ep_size: N, with strategy ``replicated``: the ranks form N groups of
            consecutive ranks; an expert belongs to a group, whose ranks share its
            width. None: as many groups as ranks, which hold whole experts.
        download: what a rank fetches of a hub repository. ``ranges``: the dense tensors
            and its own experts, by HTTP byte ranges. ``full``: all files, as mlx-lm
            does.

    Raises:
        ValueError: a field has a value that is not one of those listed. (Whether there
            is such a strategy is known to `mlx_ep.exchange.STRATEGIES`, which others
            may add to.)
    """

    strategy: str = "replicated"
    mode: Mode = "auto"
    low_latency_tokens: int = 64
    round_tokens: int = 4096
    sums: Sums = "model"
    capacity: int | None = None
    reduction: Reduction = "partial_sum"
    shared_routing: SharedRouting = "auto"
    attention: Attention = "replicated"
    runner: Runner = "auto"
    backend: Backend = "auto"
    warmup: bool = True
    memory_limit_gb: float | None = None
    memory: tuple[float, ...] | None = None
    context: int = 0
    placement_file: str | None = None
    ep_size: int | None = None
    download: Download = "ranges"

    def __post_init__(self) -> None:
        self._resolve_alias()
        for name, options in (
            ("mode", get_args(Mode)),
            ("sums", get_args(Sums)),
            ("reduction", get_args(Reduction)),
            ("shared_routing", get_args(SharedRouting)),
            ("attention", get_args(Attention)),
            ("runner", get_args(Runner)),
            ("backend", get_args(Backend)),
            ("download", get_args(Download)),
        ):
            value = getattr(self, name)
            if value not in options:
                raise ValueError(
                    f"{name} must be one of {', '.join(options)}; got {value!r}."
                )
        for name in ("low_latency_tokens", "round_tokens", "capacity"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be 1 or more; got {number}.")
        if self.attention == "tensor" and self.strategy != "replicated":
            raise ValueError(
                "attention='tensor' needs the same tokens on all ranks, which is "
                f"strategy='replicated'; got strategy={self.strategy!r}. Use "
                "attention='replicated' with it."
            )
        if self.mode != "auto" and self.strategy in ("replicated", "gathered"):
            warnings.warn(
                f"mode={self.mode!r} has no effect with strategy={self.strategy!r}; "
                "it belongs to all_to_all.",
                stacklevel=3,
            )
        if self.memory_limit_gb is not None and self.memory_limit_gb <= 0:
            raise ValueError(
                "memory_limit_gb must be a number of GB above 0, or None for what "
                f"the device offers; got {self.memory_limit_gb}."
            )
        self._check_placement()

    def _check_placement(self) -> None:
        if self.memory is not None and not all(0 < m < inf for m in self.memory):
            raise ValueError(
                "memory must be the GB of each rank, numbers above 0; got "
                f"{self.memory}."
            )
        if self.context < 0 or (self.ep_size is not None and self.ep_size < 1):
            raise ValueError(
                "context must be 0 or more and ep_size 1 or more; got "
                f"{self.context} and {self.ep_size}."
            )
        if self.placement_file is not None and (self.memory or self.ep_size):
            raise ValueError(
                "placement_file says which rank holds which expert; it cannot be "
                "combined with memory or ep_size, which do so too. Give one of them."
            )
        if self.context and self.memory is None:
            warnings.warn(
                f"context={self.context} has no effect without memory.", stacklevel=4
            )

    def _resolve_alias(self) -> None:
        if self.strategy not in ALIASES:
            return
        strategy, mode = ALIASES[self.strategy]
        if mode is not None and self.mode not in ("auto", mode):
            raise ValueError(
                f"strategy={self.strategy!r} is all_to_all with mode={mode!r}; got "
                f"mode={self.mode!r}. Give one of the two."
            )
        object.__setattr__(self, "strategy", strategy)
        if mode is not None:
            object.__setattr__(self, "mode", mode)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EPConfig:
        """An EPConfig of the given fields.

        Raises:
            ValueError: a key is not a field.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"Unknown EPConfig fields: {', '.join(unknown)}. "
                f"Known are: {', '.join(known)}."
            )
        return cls(**values)
