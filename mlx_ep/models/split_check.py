"""What ``shard()`` did to a model: compared with before, checked and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ep.models.block_call import SHARED_NAMES
from mlx_ep.models.ranks import Ranks
from mlx_ep.models.sharded_layers import COLLECTIVE_LAYERS, PLAIN_LAYERS
from mlx_ep.models.sites import MoESite

USE_REPLICATED = "Use --attention replicated (or auto)."


@dataclass(frozen=True)
class DenseSplit:
    """What a model's ``shard()`` does to its dense part on one rank.

    Attributes:
        whole_bytes: of the parameters that it splits, before.
        kept_bytes: what this rank has of them.
        collectives: of one forward pass, beside those of the MoE layers.
        partial_shared: paths of the MoE blocks whose shared experts are split: their
            outputs on a rank are partial sums.
        problem: why it cannot be done, with numbers, or "".
    """

    whole_bytes: int = 0
    kept_bytes: int = 0
    collectives: int = 0
    partial_shared: frozenset[str] = field(default_factory=frozenset)
    problem: str = ""


class Before:
    """A model before ``shard()``, to compare with."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.types = {path: type(m) for path, m in self.modules.items()}
        self.counts = {
            path: {k: v for k, v in vars(m).items() if type(v) is int}
            for path, m in self.modules.items()
        }
        self.parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        # Not of parameters alone: what a layer derives for itself may be cut too.
        self.arrays = [
            value
            for module in self.modules.values()
            for value in module.values()
            if isinstance(value, mx.array)
        ]

    def heads(self) -> str:
        """The numbers of heads of the model's layers, for a person."""
        found = {
            f"{name} = {count}"
            for counts in self.counts.values()
            for name, count in counts.items()
            if name.endswith("heads")
        }
        return ", ".join(sorted(found))

    def changed(self, model: nn.Module) -> dict[str, mx.array]:
        """The parameters that are not what they were, by path."""
        now: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        return {p: a for p, a in now.items() if self.parameters.get(p) is not a}

    def check_counts(self, model: nn.Module, num_ranks: int) -> None:
        """shard() divides numbers of heads and widths, and rounds them down.

        Raises:
            ValueError: with the numbers that P does not divide.
        """
        wrong = set()
        for path, counts in self.counts.items():
            for name, count in counts.items():
                now = getattr(self.modules[path], name, count)
                # Fewer heads than ranks are repeated, where that comes out even.
                is_repeated = now == 1 and num_ranks % max(count, 1) == 0
                if now not in (count, count / num_ranks) and not is_repeated:
                    wrong.add(f"{name} = {count}")
        if wrong:
            raise cannot_split(
                model, num_ranks, f"it must divide {', '.join(sorted(wrong))}"
            )

    def check_types(self, model: nn.Module, num_ranks: int) -> None:
        """shard() takes every layer for a plain one.

        Raises:
            ValueError: a layer that it split does more than its weight says.
        """
        changed = {path.rpartition(".")[0] for path in self.changed(model)}
        for path in sorted(changed & set(self.types)):
            old = self.types[path]
            if "weight" in self.modules[path] and old not in PLAIN_LAYERS:
                raise cannot_split(
                    model, num_ranks, f"a {old.__name__} ({path}) cannot be split"
                )

    def is_input_split(self, path: str, module: nn.Module) -> bool:
        """Whether a layer has part of its inputs now, and all of its outputs."""
        old, new = self.parameters[f"{path}.weight"].shape, module["weight"].shape
        return old[-1] != new[-1] and old[0] == new[0]

    def finish(
        self, model: nn.Module, sites: Sequence[MoESite], ranks: Ranks
    ) -> DenseSplit:
        """What came of it; the parameters are made independent of the whole ones."""
        changed = self.changed(model)
        _let_go_of_the_rest(model, self.arrays)
        return DenseSplit(
            whole_bytes=sum(self.parameters[path].nbytes for path in changed),
            kept_bytes=sum(array.nbytes for array in changed.values()),
            collectives=sum(isinstance(m, COLLECTIVE_LAYERS) for m in model.modules()),
            partial_shared=self._partial_shared(model, sites, changed, ranks),
        )

    def _partial_shared(
        self,
        model: nn.Module,
        sites: Sequence[MoESite],
        changed: dict[str, mx.array],
        ranks: Ranks,
    ) -> frozenset[str]:
        found = set()
        for site in sites:
            for name in (n for n in SHARED_NAMES if site.block.get(n)):
                prefix = f"{site.path}.{name}."
                if not any(path.startswith(prefix) for path in changed):
                    continue
                found.add(site.path)
                for path, module in site.block[name].named_modules():
                    # It would be added on every rank.
                    if "bias" in module and self.is_input_split(prefix + path, module):
                        raise cannot_split(
                            model, ranks.count, f"{prefix + path} has a bias"
                        )
        return frozenset(found)


def _let_go_of_the_rest(model: nn.Module, before: Sequence[mx.array]) -> None:
    """Copy what is a part of an array, so that the whole can be freed."""
    whole = {id(array) for array in before}
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, mx.array) and id(value) not in whole:
                module[name] = mx.contiguous(value)


def cannot_split(model: nn.Module, num_ranks: int, why: str) -> ValueError:
    """An error that says what to do instead."""
    return ValueError(
        f"--attention tensor cannot split this model over {num_ranks} ranks by the "
        f"shard() of {model_file(model)}: {why}. {USE_REPLICATED}"
    )


def model_file(model: nn.Module) -> str:
    """The file of a model's class, such as ``mlx_lm/models/qwen3_moe.py``."""
    return type(model).__module__.replace(".", "/") + ".py"
