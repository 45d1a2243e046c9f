"""How each MoE block of a model can be spread over the ranks: tried, block by block.

One forward pass without experts, before anything is installed: it finds a `BlockForm`
for each block, and the model is afterwards what it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.comm import Comm
from mlx_ep.models.block_call import BlockCall, Stub, zero_column, zero_outputs
from mlx_ep.models.partial_sum import PartialSum, find_partial_sum
from mlx_ep.models.routing_probe import Probe, find_probe
from mlx_ep.models.sites import MoESite, find_moe_sites
from mlx_ep.types import to_host

_VERIFY_TOKENS = 64

Tier = Literal["routed", "partial-sum", "per-slot"]
TIERS: tuple[Tier, ...] = ("routed", "partial-sum", "per-slot")


@dataclass(frozen=True)
class BlockForm:
    """How one block runs over the ranks.

    Attributes:
        holder: the module whose ``__call__`` is to be replaced: the site's block, or
            `site.summing` where the sum over the ranks belongs there.
        probe: how its routing is read off, in the tier ``routed``.
        partial_sum: where the ranks' parts are added, in the tier ``partial-sum``.
        why_not_routed: the reason, in the other two tiers.
        partial_shared: the shared experts are split over the ranks, so that what they
            give on a rank is a partial sum too.
    """

    site: MoESite
    holder: nn.Module
    probe: Probe | None = None
    partial_sum: PartialSum | None = None
    why_not_routed: str = ""
    partial_shared: bool = False

    @property
    def tier(self) -> Tier:
        """What the block allows.

        ``routed``: experts' sums travel, by any strategy. ``partial-sum``: the block's
        own code runs on local experts, and its one sum travels, with the strategy
        ``replicated``. ``per-slot``: K outputs per token travel.
        """
        if self.probe is not None:
            return "routed"
        return "per-slot" if self.partial_sum is None else "partial-sum"

    def lowered(
        self, tier: Tier, partial_sum: PartialSum | None, reason: str
    ) -> BlockForm:
        """The same block in a tier that is not above its own."""
        if tier == "routed":
            return self
        return replace(self, probe=None, partial_sum=partial_sum, why_not_routed=reason)


def find_forms(
    model: nn.Module,
    comm: Comm,
    *,
    is_sharded: bool,
    partial_shared: Collection[str] = (),
) -> list[BlockForm]:
    """Try each block's form by one forward pass, without experts.

    Every rank must call it. The ranks communicate where a dense part that is split
    does, and to agree.

    Each block gets random tokens of its own. What makes it nonlinear may show for some
    of them only (an identity expert that no token chose), so there are many, and blocks
    of one class share the verdict, on all ranks: the lowest of their tiers. A block
    whose sum over the ranks belongs to a module around it is tried again there, in a
    second pass.

    Args:
        model: its switches may hold any experts. It stays as it is.
        is_sharded: ranks have tokens of their own, see `Strategy`.
        partial_shared: paths of the blocks whose shared experts are split over the
            ranks, see `mlx_ep.models.tensor_parallel`.
    """
    sites = find_moe_sites(model)
    if not sites:
        return []
    trials = [
        _Trial(
            BlockForm(site, site.block, partial_shared=site.path in partial_shared),
            comm,
            is_sharded,
        )
        for site in sites
    ]
    _run(model, trials)
    around = [index for index, trial in enumerate(trials) if trial.belongs_around]
    for index in around:
        trials[index] = trials[index].around()
    if around:
        _run(model, trials)
    return agree_forms([trial.form for trial in trials], comm)


class _Trial:
    """A block that is tried when it is called."""

    def __init__(self, form: BlockForm, comm: Comm, is_sharded: bool) -> None:
        self.form, self.is_found = form, False
        self._comm, self._is_sharded = comm, is_sharded
        self.block_class = type(form.holder)

    @property
    def belongs_around(self) -> bool:
        site = self.form.site
        return (
            self.form.probe is None
            and not self._is_sharded
            and site.summing is not self.form.holder
        )

    def around(self) -> _Trial:
        """The same for the module around the block."""
        form = BlockForm(
            self.form.site,
            self.form.site.summing,
            partial_shared=self.form.partial_shared,
        )
        return _Trial(form, self._comm, self._is_sharded)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
        holder = self.form.holder
        path = self.form.site.switch_path_in(holder)
        args = _without_history(args)
        call = BlockCall(holder, self.block_class, path, args, kwargs)
        if not self.is_found:
            self.form, self.is_found = self._find(call), True
        shared = whole_shared(self._comm) if self.form.partial_shared else None
        return call.run(zero_outputs, shared)

    def _find(self, call: BlockCall) -> BlockForm:
        is_split = self.form.partial_shared
        probe, reason = find_probe(call, is_split)
        partial_sum = None
        # Ranks with tokens of their own would add those of different tokens.
        if probe is None and not self._is_sharded:
            partial_sum, why_no_sum = find_partial_sum(call)
            if why_no_sum:
                reason += f", and {why_no_sum}"
        form = replace(
            self.form, probe=probe, partial_sum=partial_sum, why_not_routed=reason
        )
        if is_split and not _can_add_shared(form, call):
            reason = "its shared experts are not all that it adds"
            return form.lowered("per-slot", None, reason)
        return form


def _can_add_shared(form: BlockForm, call: BlockCall) -> bool:
    """Whether parts of the shared experts, and nothing else, join the sum."""
    if form.probe is None:
        return form.partial_sum is None or form.partial_sum.shared_once
    rest = mx.abs(call.run(zero_outputs, zero_column)).max()
    # sync: once per block, when the model is made expert-parallel.
    return not rest.item()


def whole_shared(comm: Comm) -> Stub:
    """In the place of shared experts that are split: their sum over the ranks."""
    return lambda module, x: comm.all_reduce(module(x))


def _run(model: nn.Module, trials: Sequence[_Trial]) -> None:
    # What each block is called with is all that this is for: nothing is evaluated but
    # what the blocks look at.
    with _tried(trials):
        model(mx.arange(1, _VERIFY_TOKENS + 1)[None], cache=make_prompt_cache(model))


@contextmanager
def _tried(trials: Sequence[_Trial]) -> Iterator[None]:
    for trial in trials:
        replace_call(trial.form.holder, trial)
    try:
        yield
    finally:
        for trial in trials:
            trial.form.holder.__class__ = trial.block_class
            del trial.form.holder.expert_parallel


def replace_call(
    holder: nn.Module,
    call: Callable[[tuple[Any, ...], dict[str, Any]], mx.array],
) -> None:
    """Give a module another ``__call__``: ``call(args, kwargs)``."""
    # A plain object, so that nn.Module does not take it for a parameter or child.
    holder.expert_parallel = call
    holder.__class__ = _expert_parallel_class(type(holder))


@cache
def _expert_parallel_class(block_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        return self.expert_parallel(args, kwargs)

    return type(
        f"ExpertParallel{block_class.__name__}", (block_class,), {"__call__": call}
    )


def _without_history(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a block with random tokens as its input.

    What is tried is the block's own form. With the model's own numbers all layers
    before it would be computed for that, which takes several times as long as loading.
    """
    if not args or not isinstance(args[0], mx.array):
        return args
    x = args[0]
    if not mx.issubdtype(x.dtype, mx.floating):
        return args
    return mx.random.normal(x.shape, key=mx.random.key(0)).astype(x.dtype), *args[1:]


def agree_forms(forms: Sequence[BlockForm], comm: Comm) -> list[BlockForm]:
    """One tier for all blocks of a class, on all ranks. Every rank must call it."""
    by_class: dict[type[nn.Module], list[BlockForm]] = {}
    for form in forms:
        by_class.setdefault(type(form.holder), []).append(form)
    lowest = {
        block_class: max(alike, key=lambda form: TIERS.index(form.tier))
        for block_class, alike in by_class.items()
    }
    agreed = [
        form.lowered(least.tier, least.partial_sum, least.why_not_routed)
        for form in forms
        for least in [lowest[type(form.holder)]]
    ]
    ways = mx.array([[_number(form) for form in agreed]], mx.int32)
    # sync: once, when the model is made expert-parallel.
    ranks = to_host(comm.all_gather(ways))
    # Chips may round differently, close to the tolerance.
    reason = "the ranks' checks of it disagree"
    return [
        form.lowered("per-slot", None, reason) if differ else form
        for form, differ in zip(agreed, (ranks != ranks[0]).any(axis=0), strict=True)
    ]


def _number(form: BlockForm) -> int:
    """The way in which a block was found to work, for comparing it between ranks."""
    way = form.partial_sum
    details = 0 if way is None else 4 + 2 * way.in_block + way.shared_once
    return 8 * TIERS.index(form.tier) + details
