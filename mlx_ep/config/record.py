"""The one configuration record: the default of each field, the values that it takes and
the help of its flag stand here alone. `mlx_ep.cli.flags` makes the flags of it.
"""

from __future__ import annotations

import typing
import warnings
from dataclasses import dataclass, fields
from functools import cache
from math import inf
from os import PathLike, fspath
from typing import Annotated, Any, Literal, get_args

from mlx_ep.config.checks import check_dispatch
from mlx_ep.config.flag import Flag, Setting
from mlx_ep.config.strategies import AllToAllMode, canonical, check_strategy
from mlx_ep.types import DispatchDtype, LMHead, check_value

Sums = Literal["model", "float32"]
Reduction = Literal["partial_sum", "per_slot"]
OverlapMode = Literal["none", "single", "two", "auto"]
SharedRouting = Literal["auto", "always", "never"]
Attention = Literal["replicated", "tensor", "auto"]
RunnerName = Literal["auto", "gather", "blas", "metal"]
BackendName = Literal["auto", "cpu", "metal"]
Download = Literal["ranges", "full"]


# What the stages of a pipeline do not do.
_NOT_IN_STAGES = (
    "strategy", "attention", "overlap", "context", "replica_memory", "placement_file",
    "rebalance_every", "rebalance_below", "ep_size",
)  # fmt: skip
_MAY_OVERLAP = ("overlap", "single")


@dataclass(frozen=True, kw_only=True)
class EPConfig:
    """How a model is made expert-parallel.

    Attributes:
        strategy: how tokens meet experts. ``replicated``: every rank holds the same
            tokens, and one all_sum per MoE layer completes the sum. The others are for
            ranks with tokens of their own, see `mlx_ep.exchange`. `ALIASES` has other
            names of these.
        mode: of ``all_to_all``. ``low_latency``: fixed shapes, no host sync.
            ``normal``: the routing first, then exactly the rows that are needed.
            ``auto``: low_latency where the tokens fit, else normal.
        low_latency_tokens: most tokens of one rank in mode ``low_latency``.
        round_tokens: most tokens of one rank that are exchanged at once in the other
            sharded strategies; longer prompts go in rounds.
        sums: what the sums of ``all_to_all`` travel back in. ``model``: the dtype of
            the tokens, rounded once. ``float32``: not rounded.
        dispatch_dtype: what rows travel to the experts in, and are computed from, in
            the sharded strategies. ``model``: the dtype of the tokens, as they are.
            ``bf16``: bfloat16. ``int8``, ``mxfp8``: 8 bits a value, with a float32
            scale for 128 values or, e4m3, a power of two for 32 (docs/layouts.md).
        capacity: C keeps, of the pairs of one rank's tokens and one expert, the first
            C (first choices before second ones); the others contribute 0, are counted
            and warned of. None: nothing is dropped.
        overlap: what runs while a layer's exchange is under way (docs/overlap.md).
        reduction: what that all_sum carries. ``partial_sum``: ``[T, D]`` float32,
            each rank's gate-weighted sum. ``per_slot``: ``[T, K, D]`` in the model's
            dtype, K times the bytes, which is bit-identical to one process: for
            debugging, and for some blocks (docs/models.md).
        shared_routing: whether rank 0's routing is sent to all ranks, one more
            collective per MoE layer. ``auto``: where the ranks' chips, MLX versions or
            MLX_ variables differ, and they may round differently at a near-tie.
        attention: how the dense part runs, with strategy ``replicated``.
            ``replicated``: whole on every rank. ``tensor``: split over the ranks by the
            model's own ``shard()``. ``auto``: what fits and is predicted to be faster.
        lm_head: with the dense part split, the layer that gives the logits. ``split``:
            over the ranks too, by the vocabulary, for one all_gather of logits a step.
            ``auto``: where it can be split and no rank has Metal.
        runner: what runs a rank's experts. ``gather``: MLX's gather_mm and gather_qmm.
            ``blas``: NumPy on the CPU. ``metal``: this package's kernels for decode.
            ``auto``: for each call the fastest that is right, see `mlx_ep.tune`.
        backend: what computes them and moves rows; rank 0's MLX_EP_BACKEND goes first.
        warmup: whether the ways to run experts and, on Metal, those to move their rows
            are checked and timed once, and remembered; else a rule decides.
        eval_layers: N: prompts are evaluated after every N MoE layers, as Metal ends a
            command buffer that waits for 5 s; 0: never; None: 8 with Metal, else 0.
        check_nan: whether NaN ends the run where it appears; costs host syncs.
        memory_limit_gb: most GB (10^9 bytes) of weights this rank may hold; None: what
            the device recommends (Metal) or the host has available (CPU).
        memory: GB (10^9 bytes) that each rank may hold, in rank order: experts are
            shared out in proportion to what the dense weights leave. None: evenly.
        context: tokens whose KV cache and computation have to fit into `memory` too.
        replica_memory: memory of each rank for copies of other ranks' experts, such as
            ``"24GB"``; ``"auto"``: what is left, as long as copies pay; with the
            strategies auto and local all experts, where they fit. ``"all"``: every rank
            has every expert.
        placement_file: says which rank holds which expert (`mlx_ep.placement.file`), or
            is a record of routing (.npz, `mlx_ep.placement.record`) to place them by.
        rebalance_every: forward passes after which experts are moved between ranks, by
            their load in the last ones; 0: never. See `mlx_ep.moe.RebalanceRule`.
        rebalance_below: they are moved too when the balancedness falls below it.
        ep_size: N, with strategy ``replicated``: N groups of consecutive ranks; an
            expert belongs to a group, whose ranks share its width. None: P groups.
        pp: N: the ranks are N stages of a pipeline, each of which holds some of the
            layers and spreads their experts over its ranks (docs/pipeline.md).
        download: what a rank fetches of a hub repository. ``ranges``: what it holds, by
            HTTP byte ranges. ``full``: all files.

    Raises:
        ValueError: a field's value is of another type or not one of those listed.
    """

    strategy: Annotated[
        str, Flag(help="How tokens meet the experts of other ranks")
    ] = "replicated"
    mode: Annotated[AllToAllMode, Flag(help="Of the strategy all_to_all")] = "auto"
    attention: Annotated[
        Attention,
        Flag(
            help="How attention and the other dense layers run. replicated: whole on "
            "every rank; tensor: split over the ranks by the model's own shard(); "
            "auto: the one of these that fits and is predicted to be faster"
        ),
    ] = "replicated"
    lm_head: Annotated[
        LMHead,
        Flag(
            help="With --attention tensor: the layer that gives the logits, split too, "
            "for one more collective a step; auto: where no rank has Metal"
        ),
    ] = "auto"
    low_latency_tokens: Annotated[
        int, Flag(help="Most tokens of a rank in mode low_latency", least=1)
    ] = 64
    round_tokens: Annotated[
        int, Flag(help="Most tokens of a rank exchanged at once", least=1)
    ] = 4096
    sums: Annotated[
        Sums, Flag(help="The dtype in which all_to_all sends sums back")
    ] = "model"
    dispatch_dtype: Annotated[
        DispatchDtype,
        Flag(
            help="What rows travel to the experts of other ranks in; model: as they "
            "are. int8 and mxfp8 are about half the bytes of 16 bits"
        ),
    ] = "model"
    capacity: Annotated[
        int | None,
        Flag(
            help="Most tokens of a rank that one expert takes; the rest is dropped "
            "and counted",
            least=1,
            otherwise="nothing is dropped",
        ),
    ] = None
    overlap: Annotated[
        OverlapMode, Flag(help="What runs while rows are under way (docs/overlap.md)")
    ] = "none"
    reduction: Annotated[
        Reduction,
        Flag(help="per_slot is bit-identical to one process, for K times the bytes"),
    ] = "partial_sum"
    shared_routing: Annotated[
        SharedRouting,
        Flag(help="Send rank 0's routing to all ranks; auto: where their chips differ"),
    ] = "auto"
    runner: Annotated[RunnerName, Flag(help="What runs the experts of a rank")] = "auto"
    backend: Annotated[
        BackendName, Flag(help="What computes them; MLX_EP_BACKEND goes first")
    ] = "auto"
    warmup: Annotated[
        bool,
        Flag(help="Neither check nor time ways to run experts", name="--no-warmup"),
    ] = True
    eval_layers: Annotated[
        int | None,
        Flag(
            help="Prompts: evaluate after every N MoE layers; 0: never",
            metavar="N",
            least=0,
            otherwise="8 on Metal, else 0",
        ),
    ] = None
    check_nan: Annotated[
        bool, Flag(help="Look for NaN in each MoE layer: says the rank and the layer")
    ] = False
    memory_limit_gb: Annotated[
        float | None,
        Flag(
            help="Most GB of weights a rank may hold",
            otherwise="what the device offers",
        ),
    ] = None
    download: Annotated[
        Download,
        Flag(
            help="Of a hub repository: ranges fetches what this rank needs, full all "
            "files"
        ),
    ] = "ranges"
    memory: Annotated[
        tuple[float, ...] | None,
        Flag(
            help="GB that each rank may hold, in rank order: gives each its share of "
            "the experts",
            metavar="GB,GB,...",
            otherwise="the same number of experts for every rank",
        ),
    ] = None
    replica_memory: Annotated[
        str,
        Flag(
            help="Memory of each rank for copies of experts of other ranks, such as "
            "24GB; all: every rank has every expert; auto: what is left beside the KV "
            "cache of --context tokens, as long as copies pay (docs/balance.md)",
            metavar="GB",
        ),
    ] = "0"
    placement_file: Annotated[
        str | None,
        Flag(
            help="A JSON file that says which rank holds which experts, or an .npz "
            "that --record wrote, by which they are placed (docs/balance.md)",
            name="--placement",
            metavar="FILE",
        ),
    ] = None
    rebalance_every: Annotated[
        int,
        Flag(
            help="Passes after which experts move between ranks by their load in the "
            "last ones; 0: never (docs/balance.md)",
            metavar="N",
            least=0,
        ),
    ] = 0
    rebalance_below: Annotated[
        float,
        Flag(
            help="They move too when the balancedness (0 to 1) falls below it",
            metavar="X",
        ),
    ] = 0.0
    ep_size: Annotated[
        int | None,
        Flag(
            help="With strategy replicated: N groups of ranks; experts belong to a "
            "group, whose ranks share their width",
            name="--ep",
            metavar="N",
            least=1,
            otherwise="as many as ranks",
        ),
    ] = None
    pp: Annotated[
        int,
        Flag(
            help="N stages of ranks: each stage holds some of the layers, and spreads "
            "their experts over its ranks; MPI or a ring (docs/pipeline.md)",
            metavar="N",
            least=1,
        ),
    ] = 1
    context: Annotated[
        int,
        Flag(
            help="With --memory: leave room for the KV cache of that many tokens, and "
            "for computing them",
            metavar="TOKENS",
            least=0,
        ),
    ] = 0

    def __post_init__(self) -> None:
        if isinstance(self.memory, list):
            object.__setattr__(self, "memory", tuple(self.memory))
        if isinstance(self.placement_file, PathLike):
            object.__setattr__(self, "placement_file", fspath(self.placement_file))
        strategy, mode = canonical(self.strategy, self.mode)
        object.__setattr__(self, "strategy", strategy)
        object.__setattr__(self, "mode", mode)
        for name, kind, _, flag in settings():
            check_value(name, kind, getattr(self, name), flag.least)
        check_strategy(self.strategy)
        if self.attention == "tensor" and self.strategy != "replicated":
            raise ValueError(
                "attention='tensor' needs the same tokens on all ranks, which is "
                f"strategy='replicated'; got strategy={self.strategy!r}. Use "
                "attention='replicated' with it."
            )
        if self.mode != "auto" and self.strategy in ("replicated", "gathered", "local"):
            warnings.warn(
                f"mode={self.mode!r} has no effect with strategy={self.strategy!r}; "
                "it belongs to all_to_all.",
                stacklevel=3,
            )
        if self.dispatch_dtype != "model":
            check_dispatch(self.dispatch_dtype, self.strategy, self.reduction)
        if self.lm_head == "split" and self.attention == "replicated":
            text = "lm_head='split' has no effect with attention='replicated'."
            warnings.warn(text, stacklevel=3)
        if (limit := self.memory_limit_gb) is not None and not 0 < limit < inf:
            raise ValueError(f"memory_limit_gb must be above 0 or None, not {limit}.")
        if not 0 <= (below := self.rebalance_below) <= 1:
            raise ValueError(f"rebalance_below must be 0 to 1, not {below}.")
        self._check_placement()
        self._check_stages()

    def _check_placement(self) -> None:
        if self.memory is not None and not all(0 < m < inf for m in self.memory):
            raise ValueError(f"memory must be numbers above 0; got {self.memory}.")
        is_record = str(self.placement_file).endswith(".npz")
        if is_record and self.ep_size:
            raise ValueError(
                "A record of routing places whole experts; it cannot be combined with "
                "ep_size, which shares their width. Give one of them."
            )
        if self.placement_file and not is_record and (self.memory or self.ep_size):
            raise ValueError(
                "placement_file says which rank holds which expert; it cannot be "
                "combined with memory or ep_size, which do so too. Give one of them."
            )
        self._check_replicas()
        if self.context and self.memory is None and self.replica_memory != "auto":
            warnings.warn(
                f"context={self.context} has no effect without memory.", stacklevel=4
            )

    @property
    def replica_bytes(self) -> int | None:
        """Of `replica_memory`, on each rank; None: "auto" or "all"."""
        if self.replica_memory in ("auto", "all"):
            return None
        return int(float(self.replica_memory.upper().removesuffix("GB")) * 1e9)

    def _check_replicas(self) -> None:
        try:
            is_known = (n := self.replica_bytes) is None or n >= 0
        except (ValueError, OverflowError):
            is_known = False
        if not is_known:
            raise ValueError(
                'replica_memory must be a number of GB such as "24GB", "auto", '
                f'"all" or "0"; got {self.replica_memory!r}.'
            )
        is_moved = self.rebalance_every or self.rebalance_below
        if is_moved and (self.replica_memory == "all" or self.strategy == "local"):
            raise ValueError(
                "rebalance_every and rebalance_below move experts between ranks; with "
                "replica_memory='all' or strategy='local' every rank has every expert, "
                "and there is none to move. Leave them out."
            )
        if self.replica_bytes == 0:
            return
        is_file = self.placement_file and not self.placement_file.endswith(".npz")
        if is_file or self.ep_size is not None:
            raise ValueError(
                "replica_memory makes copies of whole experts; it cannot be combined "
                "with ep_size, which shares their width, nor with placement_file, "
                "which says itself where copies are. Give one of them."
            )

    def _check_stages(self) -> None:
        if self.pp == 1:
            return
        default = {each.name: each for each in settings()}
        for name in _NOT_IN_STAGES:
            value = getattr(self, name)
            if value != default[name].default and (name, value) != _MAY_OVERLAP:
                raise ValueError(
                    f"--pp {self.pp} does not go with {default[name].flag_name} "
                    f"{value}. Leave one of the two out."
                )

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


@cache
def settings() -> tuple[Setting, ...]:
    """The fields of EPConfig, with what their flags say."""
    hints = typing.get_type_hints(EPConfig, include_extras=True)
    found = []
    for each in fields(EPConfig):
        kind, flag = get_args(hints[each.name])
        found.append(Setting(each.name, kind, each.default, flag))
    return tuple(found)
