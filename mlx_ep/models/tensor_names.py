"""Which tensors of a checkpoint hold experts, told from name and shape.

Two layouts exist, in mlx-lm's own conversions and on the hub:

    per expert   model.layers.3.mlp.experts.17.up_proj.weight       [F, D]
    stacked      model.layers.3.mlp.switch_mlp.up_proj.weight       [E, F, D]

The names alone do not tell (a shared bias may live below ``experts``, another stack may
be called alike), so that a stacked tensor must also have E as its first axis.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# phixtral calls its list of experts `moe.mlp`.
_PER_EXPERT = re.compile(r"\.(?:experts|moe\.mlp)\.(\d+)\.")

_STACKED = re.compile(
    r"\.(?:switch_mlp|switch_glu|experts)\."
    r"(?:gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2)(?:[._]|$)"
    # granitemoe fuses gate and up into one `input_linear`.
    r"|\.block_sparse_moe\.(?:input_linear|output_linear)(?:[._]|$)"
    # dbrx, given an axis for the experts
    r"|\.ffn\.experts\.mlp\.(?:w1|v1|w2)$"
    # step3p5
    r"|\.moe\.(?:gate_proj|up_proj|down_proj)(?:[._]|$)"
)


@dataclass(frozen=True)
class ExpertTensor:
    """What an expert tensor of a checkpoint is.

    Attributes:
        expert: the expert it belongs to; None for a stack of all of them.
        before: the name up to the expert's number.
        after: the name behind it.
    """

    expert: int | None
    before: str = ""
    after: str = ""

    def renamed(self, slot: int) -> str:
        """The name with the expert's number replaced by `slot`."""
        return f"{self.before}{slot}{self.after}"


def expert_tensor(
    name: str, shape: tuple[int, ...], num_experts: int
) -> ExpertTensor | None:
    """What `name` holds of the experts, or None for a dense tensor."""
    if match := _PER_EXPERT.search(name):
        return ExpertTensor(int(match[1]), name[: match.start(1)], name[match.end(1) :])
    if shape[:1] == (num_experts,) and _STACKED.search(name):
        return ExpertTensor(None)
    return None
