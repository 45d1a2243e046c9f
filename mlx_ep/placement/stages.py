"""Which layers of a model a rank holds, where the ranks are stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class StageLayers:
    """The layers of one stage.

    Attributes:
        start: the first layer; `stop`: the one behind the last.
        num_layers: of the model.
        list_name: what the model's list of layers is called, such as ``layers``.
    """

    start: int
    stop: int
    num_layers: int
    list_name: str

    def holds(self, layer: int) -> bool:
        return self.start <= layer < self.stop

    def is_elsewhere(self, tensor_name: str) -> bool:
        """Whether a tensor of a checkpoint is of a layer of another stage.

        Told by its first number: ``model.layers.3.mlp.experts.17.up_proj.weight`` is of
        layer 3. A number behind another name counts no layers.
        """
        parts = tensor_name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
        if not at or parts[at - 1] != self.list_name:
            return False
        layer = int(parts[at])
        return layer < self.num_layers and not self.holds(layer)

    def describe(self) -> str:
        """For a person: ``layers 0..3 of 8``."""
        return f"layers {self.start}..{self.stop - 1} of {self.num_layers}"


def check_stages(num_stages: int, num_ranks: int) -> int:
    """How many ranks each stage has.

    Raises:
        ValueError: the stages do not share out the ranks.
    """
    if num_ranks % num_stages:
        raise ValueError(
            f"--pp {num_stages} must divide the {num_ranks} ranks into stages of as "
            "many ranks each. Use another number of stages or of ranks."
        )
    return num_ranks // num_stages


def cut_stages(
    layer_bytes: Sequence[int], num_stages: int, room: Sequence[int] | None = None
) -> list[range]:
    """Consecutive layers for each stage; the largest stage has as few bytes as it can.

    >>> cut_stages([1, 9, 9, 9], 2)
    [range(0, 2), range(2, 4)]
    >>> cut_stages([1, 1, 1, 1], 2, room=[30, 10])
    [range(0, 3), range(3, 4)]

    Args:
        layer_bytes: of each layer.
        num_stages: at least 1.
        room: the bytes above 0 that each stage has for layers; the fullest stage is
            then as little full as it can be. None: alike.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    share = [Fraction(1, each) for each in room or [1] * num_stages]
    count = len(layer_bytes)
    if count < num_stages:
        raise ValueError(
            f"--pp {num_stages} needs at least one layer for each stage; the model "
            f"has {count}."
        )
    ends = [0]
    for size in layer_bytes:
        ends.append(ends[-1] + size)
    # best[j]: of the first j layers in so many stages, the largest one and its cut.
    best: list[tuple[Fraction, tuple[int, ...]] | None] = [
        (ends[j] * share[0], (j,)) if j else None for j in range(count + 1)
    ]
    for stages in range(2, num_stages + 1):
        found: list[tuple[Fraction, tuple[int, ...]] | None] = [None] * (count + 1)
        part = share[stages - 1]
        for j in range(stages, count + 1):
            options = [
                (max(before[0], (ends[j] - ends[i]) * part), (*before[1], j))
                for i in range(stages - 1, j)
                if (before := best[i]) is not None
            ]
            # Of cuts that are as good, the one whose first stages have more layers.
            found[j] = min(options, key=lambda o: (o[0], [-stop for stop in o[1]]))
        best = found
    last = best[count]
    assert last is not None
    stops = last[1]
    return [range(a, b) for a, b in zip((0, *stops), stops)]
