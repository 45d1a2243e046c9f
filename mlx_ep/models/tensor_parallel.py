"""Splits the dense part of a model over the ranks, by the model's own ``shard()``.

mlx-lm's `shard` splits attention, dense layers, shared and routed experts. Here it runs
while other layers stand in for the routed experts, which are this rank's already. What
it makes then gets two changes, for which classes are replaced by subclasses and nothing
is written anew:

- The layers that reduce do so through a `Comm`, as the experts do: collectives on two
  streams would share the sockets at once.
- MoE blocks do not reduce by themselves. The partial sums of split shared experts join
  those of the routed experts, for one collective (`BlockState`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear

from mlx_ep.comm import Comm
from mlx_ep.models.block_call import SHARED_NAMES
from mlx_ep.models.ranks import Ranks
from mlx_ep.models.sharded_layers import (
    COLLECTIVE_LAYERS,
    GATHERED_BY_OWNER,
    SUMMED_BY_OWNER,
    THROUGH_COMM,
)
from mlx_ep.models.sites import MoESite, find_moe_sites
from mlx_ep.models.split_check import (
    USE_REPLICATED,
    Before,
    DenseSplit,
    cannot_split,
    model_file,
)
from mlx_ep.types import LMHead


def tensor_problem(model: nn.Module, num_ranks: int) -> str:
    """Why the dense part of a model cannot be split over P ranks, or "" if it can.

    The model is left as it was, and no parameter is evaluated: a model that is only
    built from its config.json will do.
    """
    return plan_split(model, num_ranks).problem


def shard_problem(model: nn.Module, num_ranks: int, rank: int = 0) -> str:
    """Why mlx-lm's own ``shard()`` cannot split all of a model over P ranks, or "".

    Where it can, the model is split now, as far as shapes go: experts too, and without
    the checks of `split_dense`.
    """
    if not hasattr(model, "shard"):
        return f"mlx-lm's {model_file(model).removeprefix('mlx_lm/')} has no shard()"
    try:
        model.shard(Ranks(rank, num_ranks))
    except ValueError as error:  # heads, widths or their groups that P does not divide
        return f"shard() cannot split it over {num_ranks} ranks: {error}"
    return ""


def plan_split(
    model: nn.Module, num_ranks: int, rank: int = 0, lm_head: LMHead = "whole"
) -> DenseSplit:
    """What `split_dense` would do to a model, which is left as it was."""
    undo = _remember(model)
    try:
        return _split(model, Ranks(rank, num_ranks), lm_head)
    except ValueError as error:
        return DenseSplit(problem=str(error))
    finally:
        undo()


def split_dense(
    model: nn.Module, num_ranks: int, rank: int, lm_head: LMHead = "whole"
) -> DenseSplit:
    """Split the dense part of a model in place, by its own ``shard()``.

    Its switches may hold any experts; they stay as they are. Nothing is evaluated: on a
    model whose parameters are still to be read, what a rank does not keep is freed when
    its parameter is evaluated. `connect` must follow before the model is called.

    Args:
        lm_head: the layer that gives the logits. ``whole``: as `shard` leaves it, which
            with most models is whole. ``split``: by the vocabulary, and each rank gets
            all logits. ``auto``: likewise, where it can be.

    Raises:
        ValueError: it cannot be done; the model is left as it was.
    """
    undo = _remember(model)
    try:
        return _split(model, Ranks(rank, num_ranks), lm_head)
    except ValueError:
        undo()
        raise


def connect(model: nn.Module, comm: Comm) -> None:
    """Let what `split_dense` made reduce through `comm`."""
    for module in model.modules():
        if isinstance(module, COLLECTIVE_LAYERS):
            module.comm = comm


def _split(model: nn.Module, ranks: Ranks, lm_head: LMHead) -> DenseSplit:
    """`split_dense`, which leaves the model half split where it raises."""
    shard = _find_shard(model)
    sites = find_moe_sites(model)
    kept_whole = _shared_outside_blocks(sites)
    before = Before(model)
    with _stand_ins([site.switch for site in sites] + kept_whole, ranks.count):
        try:
            shard(ranks)
        except (
            ValueError, AssertionError, TypeError, AttributeError, ZeroDivisionError,
        ) as error:  # fmt: skip
            before.check_counts(model, ranks.count)
            why = f"{str(error).rstrip('.')} ({before.heads()})"
            raise cannot_split(model, ranks.count, why) from error
    before.check_counts(model, ranks.count)
    before.check_types(model, ranks.count)
    _communicate_through_comm(model, sites, before, ranks)
    if lm_head != "whole":
        problem = _split_lm_head(model, ranks)
        if problem and lm_head == "split":
            raise ValueError(problem)
    return before.finish(model, sites, ranks)


def _split_lm_head(model: nn.Module, ranks: Ranks) -> str:
    """Split the layer that gives the logits by its outputs; why it cannot be, or ""."""
    owners = [o for o in (model, model.get("language_model")) if o is not None]
    owner = next((o for o in owners if "lm_head" in o), None)
    if owner is None:
        problem = f"{model_file(model)} takes its embeddings for it"
    elif isinstance(layer := owner["lm_head"], COLLECTIVE_LAYERS):
        return ""  # by the model's own shard()
    elif type(layer) not in SUMMED_BY_OWNER:
        problem = f"a {type(layer).__name__} cannot be split"
    elif (size := layer["weight"].shape[0]) % ranks.count:
        problem = f"it has {size} outputs"
    else:
        group: Any = ranks
        owner["lm_head"] = part = shard_linear(layer, "all-to-sharded", group=group)
        part.__class__ = GATHERED_BY_OWNER[type(part)]
        return ""
    return (
        f"--lm-head split must divide the layer that gives the logits over "
        f"{ranks.count} ranks: {problem}. Use --lm-head whole (or auto)."
    )


def _find_shard(model: nn.Module) -> Callable[[Ranks], None]:
    """The model's own ``shard``, or that of the language model it wraps.

    Raises:
        ValueError: neither has one.
    """
    for owner in (model, model.get("language_model")):
        if owner is None:
            continue
        if hasattr(owner, "shard"):
            return owner.shard
        # A wrapper that builds on another file's layers (kimi_vl on deepseek_v3).
        layers = type(owner.get("model"))
        home = getattr(sys.modules[layers.__module__], "Model", None)
        if home is not None and hasattr(home, "shard"):
            return partial(home.shard, owner)
    raise ValueError(
        f"--attention tensor needs a model that mlx-lm can split: {model_file(model)} "
        f"defines no shard(). {USE_REPLICATED}"
    )


def _shared_outside_blocks(sites: Sequence[MoESite]) -> list[nn.Module]:
    """Shared experts that a module around the block adds: every rank keeps them whole.

    Their partial sums could not join those of the routed experts, which the block has
    completed by then, and would need a collective of their own.
    """
    outer = [site.summing for site in sites if site.summing is not site.block]
    return [o[name] for o in outer for name in SHARED_NAMES if o.get(name)]


@contextmanager
def _stand_ins(owners: Sequence[nn.Module], num_ranks: int) -> Iterator[None]:
    """Empty layers in the place of the owners' own, for as long as shard() runs."""
    own = [
        (owner, name, child)
        for owner in owners
        for name, child in owner.items()
        if isinstance(child, nn.Module) and "weight" in child
    ]
    for owner, name, _ in own:
        stand_in = nn.Module()
        stand_in.bias = mx.zeros((num_ranks,))  # gpt_oss divides it
        owner[name] = stand_in
    try:
        yield
    finally:
        for owner, name, child in own:
            owner[name] = child


def _communicate_through_comm(
    model: nn.Module, sites: Sequence[MoESite], before: Before, ranks: Ranks
) -> None:
    """Give the layers that communicate the classes that do it through a `Comm`.

    Raises:
        ValueError: a module communicates in a way that is not known here.
    """
    moe = {p for s in sites for p in (s.path, s.summing_path)}
    owners = []
    for path, module in model.named_modules():
        if type(module) in THROUGH_COMM:
            module.__class__ = THROUGH_COMM[type(module)]
        if getattr(module, "sharding_group", None) is ranks:
            module.sharding_group = None
            owners.append((path, module))
    for path, owner in owners:
        children = {
            f"{path}.{name}".lstrip("."): child
            for name, child in owner.items()
            if isinstance(child, nn.Module)
        }
        gathered = [c for c in children.values() if type(c) in GATHERED_BY_OWNER]
        summed = [
            child
            for name, child in children.items()
            if type(child) in SUMMED_BY_OWNER and before.is_input_split(name, child)
        ]
        if path in moe and not gathered and not summed:
            continue  # the sum of its experts, which BlockState completes
        if len(gathered) + len(summed) != 1 or (summed and "bias" in summed[0]):
            raise cannot_split(
                model, ranks.count, f"{path} communicates in a way of its own"
            )
        child = (gathered + summed)[0]
        child.__class__ = (GATHERED_BY_OWNER | SUMMED_BY_OWNER)[type(child)]
    # Layers split by outputs keep the group for gradients, which nobody asks for here.
    known = (*COLLECTIVE_LAYERS, *GATHERED_BY_OWNER)
    for path, module in model.named_modules():
        if ranks in vars(module).values() and not isinstance(module, known):
            raise cannot_split(
                model, ranks.count, f"{path} communicates in a way of its own"
            )


def _remember(model: nn.Module) -> Callable[[], None]:
    """A function that makes a model and all its modules what they are now."""
    state = [(m, type(m), dict(m), dict(vars(m))) for m in model.modules()]

    def undo() -> None:
        for module, module_class, items, attributes in state:
            module.__class__ = module_class
            dict.clear(module)
            dict.update(module, items)
            vars(module).clear()
            vars(module).update(attributes)

    return undo
