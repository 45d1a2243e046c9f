"""Files of recorded routing: how often experts were used, alone and together.

    routing.npz    counts [layers, E]            tokens that took each expert
                   coactivations [layers, E, E]  tokens that took both; the diagonal is
                                                 counts
    routing.json   {"format": "mlx_ep.routing", "version": 1, "num_experts": E,
                    "top_k": K, ...}

`mlx_ep.moe.RoutingRecorder` writes them; `--placement routing.npz` places by them, and
the simulator's policy TRACE routes by them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mlx_ep.placement.load import LayerLoad

FORMAT, VERSION = "mlx_ep.routing", 1


class RecordedRouting(NamedTuple):
    """Recorded routing.

    Attributes:
        coactivations: per layer, the tokens that took both of two experts; on the
            diagonal those that took one.
        top_k: K.
    """

    coactivations: Int[np.ndarray, "layers E E"]
    top_k: int

    @property
    def counts(self) -> Int[np.ndarray, "layers E"]:
        """Tokens that took each expert."""
        return np.diagonal(self.coactivations, axis1=1, axis2=2)

    def loads(self) -> list[LayerLoad]:
        """Of each layer, for `balance`."""
        return [
            LayerLoad(np.diagonal(both).astype(np.float64), both.astype(np.float64),
                      self.top_k)
            for both in self.coactivations
        ]  # fmt: skip

    def whole_load(self) -> LayerLoad:
        """Of all layers as one, for a placement that holds for every layer."""
        both = self.coactivations.astype(np.float64)
        per_layer = np.maximum(np.trace(both, axis1=1, axis2=2), 1)
        mean = (both / per_layer[:, None, None]).mean(axis=0) * self.top_k
        return LayerLoad(np.diagonal(mean).copy(), mean, self.top_k)


def is_record(path: str | Path) -> bool:
    """Whether a file that is given as a placement is a record, by its name."""
    return Path(path).suffix == ".npz"


def write_record(path: str | Path, record: RecordedRouting, **more: Any) -> None:
    """Write ``path`` (.npz) and the .json beside it.

    Args:
        more: what else the .json says.

    Raises:
        ValueError: the name does not end in .npz.
    """
    file = Path(path)
    if not is_record(file):
        raise ValueError(f"A record is an .npz file; got the name {file}.")
    np.savez_compressed(file, counts=record.counts, coactivations=record.coactivations)
    layers, num_experts = record.counts.shape
    described = {
        "format": FORMAT,
        "version": VERSION,
        "num_experts": num_experts,
        "top_k": record.top_k,
        "num_layers": layers,
        **more,
    }
    file.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")


def read_record(path: str | Path, num_experts: int) -> RecordedRouting:
    """A record, for a model of so many experts.

    Raises:
        ValueError: it cannot be read, is none, or is of another model.
    """
    file = Path(path)
    try:
        described = json.loads(file.with_suffix(".json").read_text())
        with np.load(file) as arrays:
            both = arrays["coactivations"]
    except OSError as error:
        raise ValueError(
            f"The record {error.filename or file} cannot be read here: "
            f"{error.strerror}. Every rank reads its own copy: put the .npz and its "
            ".json on every host, at the same path."
        ) from None
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} is no record of routing: {error}.") from None
    found = described if isinstance(described, dict) else {}
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f'{file.with_suffix(".json")} must say "format": "{FORMAT}" and "version": '
            f"{VERSION}; it says {found.get('format')!r} and {found.get('version')!r}."
        )
    top_k = found.get("top_k")
    if both.ndim != 3 or both.shape[1:] != (num_experts, num_experts):
        raise ValueError(
            f"{file} must be a record of {num_experts} experts; its coactivations are "
            f"{list(both.shape)}."
        )
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"{file}: top_k must be 1 to {num_experts}; got {top_k!r}.")
    if not both.size or both.min() < 0 or not both.any():
        raise ValueError(f"{file} must have counts, 0 or more; it has none.")
    return RecordedRouting(both, top_k)
