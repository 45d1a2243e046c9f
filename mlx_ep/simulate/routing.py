"""Which experts the tokens of a step choose: rows and distinct experts of each rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mlx_ep.placement import LayerLoad, Placement
from mlx_ep.simulate.fields import Fields, is_number, read_json
from mlx_ep.simulate.placed import DrawnRouting, Loads, PlacedRouting

EXPERT_POLICIES = ("COPY", "BALANCED", "RR", "RAND", "CUSTOM", "TRACE")
RECORDING_FORMAT, RECORDING_VERSION = "mlx_ep.routing", 1
# RAND: so many draws of a layer for each number of tokens; up to so many tokens they
# are drawn token by token, beyond as normal numbers of the same mean and spread.
DRAWS, DRAWN_TOKENS = 16, 64


@runtime_checkable
class ExpertRouting(Protocol):
    """What a policy says of any number of tokens."""

    @property
    def is_sampled(self) -> bool:
        """Whether each step takes one row of the loads; else a step has them all, as
        its layers.
        """
        ...

    def loads(self, tokens: int) -> Loads:
        """Of so many tokens, of all that exchange with one another."""
        ...


@dataclass(frozen=True)
class Even:
    """Every expert as likely as every other, and every rank with the same.

    E * (1 - (1 - K / E) ** T) distinct experts of T tokens, as a token takes K
    different ones.
    """

    num_experts: int
    top_k: int
    num_ranks: int
    is_sampled: bool = False

    def loads(self, tokens: int) -> Loads:
        e, k = self.num_experts, self.top_k
        distinct = e * (1 - (1 - k / e) ** tokens)
        shape = (1, self.num_ranks)
        return Loads(
            np.full(shape, tokens * k / self.num_ranks),
            np.full(shape, distinct / self.num_ranks),
        )


@dataclass(frozen=True)
class Busiest:
    """Every expert as likely as every other; the busiest rank is as busy as expected.

    One layer stands for all of them.
    """

    num_experts: int
    top_k: int
    num_ranks: int
    is_sampled: bool = False

    def loads(self, tokens: int) -> Loads:
        moments = _moments(self.num_experts, self.top_k, self.num_ranks, tokens)
        beyond = largest_of_normals(self.num_ranks)
        own = self.num_experts / self.num_ranks
        pairs = moments.pairs + beyond * moments.pairs_spread
        distinct = moments.distinct + beyond * moments.distinct_spread
        most = min(own, tokens * self.top_k)
        return Loads(
            np.array([[min(pairs, tokens * min(self.top_k, own))]]),  # on host
            np.array([[min(distinct, most)]]),  # on host
        )


@dataclass(frozen=True)
class RoundRobin:
    """Experts in turns, rank by rank: pair i goes to rank i mod P."""

    num_experts: int
    top_k: int
    num_ranks: int
    is_sampled: bool = False

    def loads(self, tokens: int) -> Loads:
        pairs = tokens * self.top_k
        ranks = np.arange(self.num_ranks)
        each = (pairs + self.num_ranks - 1 - ranks) // self.num_ranks
        own = self.num_experts // self.num_ranks
        return Loads(
            each[None].astype(float), np.minimum(each, own)[None].astype(float)
        )


@dataclass(frozen=True)
class Random:
    """Every token draws its experts; every step has draws of its own."""

    num_experts: int
    top_k: int
    num_ranks: int
    seed: int = 0
    is_sampled: bool = True

    def loads(self, tokens: int) -> Loads:
        key = [self.seed, tokens, self.num_experts]
        random = np.random.default_rng(key)
        own = self.num_experts // self.num_ranks
        if tokens <= DRAWN_TOKENS:
            keys = random.random((DRAWS, tokens, self.num_experts))
            chosen = np.argpartition(keys, self.top_k - 1, axis=-1)[..., : self.top_k]
            flat = chosen.reshape(DRAWS, -1)
            counts = np.stack(
                [np.bincount(row, minlength=self.num_experts) for row in flat]
            ).reshape(DRAWS, self.num_ranks, own)
            return Loads(
                counts.sum(axis=-1).astype(float), (counts > 0).sum(axis=-1) * 1.0
            )
        moments = _moments(self.num_experts, self.top_k, self.num_ranks, tokens)
        noise = random.standard_normal((2, DRAWS, self.num_ranks))
        most = tokens * min(self.top_k, own)
        return Loads(
            np.clip(moments.pairs + noise[0] * moments.pairs_spread, 0, most),
            np.clip(moments.distinct + noise[1] * moments.distinct_spread, 0, own),
        )


class Weighted:
    """Experts with probabilities of their own, per layer.

    Args:
        chances: ``[layers, E]``: that a token takes the expert; each row sums to K.
        num_ranks: P; experts lie on them in order, as many on each.
    """

    is_sampled = False

    def __init__(self, chances: np.ndarray, num_ranks: int) -> None:
        layers, experts = chances.shape
        self._chances = chances.reshape(layers, num_ranks, experts // num_ranks)

    def loads(self, tokens: int) -> Loads:
        return Loads(
            tokens * self._chances.sum(axis=-1),
            (1 - (1 - self._chances) ** tokens).sum(axis=-1),
        )


class _Moments(NamedTuple):
    """Of one rank; spreads are those of what ranks differ by."""

    pairs: float | int
    pairs_spread: float | int
    distinct: float | int
    distinct_spread: float | int


def _moments(experts: int, top_k: int, num_ranks: int, tokens: int) -> _Moments:
    """Mean and spread of one rank's pairs and distinct experts, for uniform routing.

    Ranks are exchangeable with variance v and covariance c, so their largest is
    mean + sqrt(v - c) * (expected largest of as many normal numbers).
    """
    e, k, n = experts, top_k, experts / num_ranks
    # A pair of experts: neither is taken by any of T tokens with probability q2.
    q1 = (1 - k / e) ** tokens
    q2 = ((e - k) * (e - k - 1) / (e * (e - 1))) ** tokens if e > 1 else 0.0
    variance = n * q1 + n * (n - 1) * q2 - (n * q1) ** 2
    covariance = n * n * (q2 - q1 * q1)
    share = 1 / num_ranks
    own = k * share * (1 - share) * (e - k) / max(e - 1, 1)
    # Pairs of all ranks sum to T * K, so that each covariance is -v / (P - 1).
    pairs = tokens * own * (1 + 1 / max(num_ranks - 1, 1))
    return _Moments(
        tokens * k * share,
        float(np.sqrt(max(pairs, 0.0))) if num_ranks > 1 else 0.0,
        n * (1 - q1),
        float(np.sqrt(max(variance - covariance, 0.0))) if num_ranks > 1 else 0.0,
    )


@lru_cache
def largest_of_normals(count: int) -> float:
    """The expected largest of so many independent standard normal numbers.

    >>> round(largest_of_normals(2), 4)
    0.5642
    """
    if count == 1:
        return 0.0
    x = np.linspace(-9, 9, 20001)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    return float(np.sum(x * count * density * below ** (count - 1)) * (x[1] - x[0]))


def make_routing(
    policy: str,
    num_experts: int,
    top_k: int,
    num_ranks: int,
    *,
    file: Path | None = None,
    seed: int = 0,
    placement: Placement | None = None,
) -> ExpertRouting:
    """The routing of a policy.

    Args:
        file: CUSTOM: JSON, a weight for each expert, or a list of such lists, one per
            layer. TRACE: a recording, see `read_recording`.
        placement: of the experts on the ranks, maybe with copies; None: contiguous.

    Raises:
        ValueError: there is no such policy, or what is wrong with the file.
    """
    sizes = (num_experts, top_k, num_ranks)
    where = placement or Placement.contiguous(num_experts, num_ranks)
    if policy in ("CUSTOM", "TRACE"):
        if file is None:
            raise ValueError(
                f"--expert-routing-policy {policy} needs --expert-routing-file."
            )
        if policy == "TRACE":
            recorded = read_recording(file, num_experts, top_k)
            chances, together = recorded.chances, recorded.together
        else:
            chances, together = read_weights(file, num_experts, top_k), None
        if placement is None and together is None:
            return Weighted(chances, num_ranks)
        if together is None:
            layers = [LayerLoad(of_layer, None, top_k) for of_layer in chances]
        else:
            layers = [LayerLoad(np.diagonal(b), b, top_k) for b in together]
        return DrawnRouting(layers, where)
    if placement is not None:
        if policy not in ("COPY", "RAND"):
            raise ValueError(
                f"--expert-routing-policy {policy} has no say where experts are; with "
                "a placement or copies it must be COPY, RAND, CUSTOM or TRACE."
            )
        return PlacedRouting(placement, top_k, policy == "RAND", seed)
    if policy == "COPY":
        return Busiest(*sizes)
    if policy == "BALANCED":
        return Even(*sizes)
    if policy == "RR":
        return RoundRobin(*sizes)
    if policy == "RAND":
        return Random(*sizes, seed=seed)
    raise ValueError(
        f"An expert routing policy must be one of {', '.join(EXPERT_POLICIES)}; got "
        f"{policy!r}."
    )


def read_weights(file: Path, num_experts: int, top_k: int) -> np.ndarray:
    """``[layers, E]`` chances from a JSON file of weights.

    Raises:
        ValueError: they are not one per expert, or not above 0 in enough of them.
    """
    content = read_json(file)
    rows = content if content and isinstance(content[0], list) else [content]
    for row in rows:
        is_list = isinstance(row, list) and len(row) == num_experts
        if not is_list or not all(is_number(w) and 0 <= w < np.inf for w in row):
            raise ValueError(
                f"{file}: must hold a weight from 0 on for each of {num_experts} "
                "experts, or one such list per layer."
            )
    return chances_of(np.array(rows, np.float64), top_k, str(file))  # on host


class Recorded(NamedTuple):
    """What a recording says.

    Attributes:
        chances: ``[layers, E]``.
        together: ``[layers, E, E]`` tokens that took both of two experts; None: that
            was not recorded.
    """

    chances: np.ndarray
    together: np.ndarray | None


def read_recording(file: Path, num_experts: int, top_k: int) -> Recorded:
    """Recorded routing.

    A recording is an ``.npz`` with ``counts [layers, E]``, how many tokens took each
    expert, and beside it a ``.json`` of the same name: ``format`` "mlx_ep.routing",
    ``version`` 1, ``num_experts``, ``top_k``. ``coactivations [layers, E, E]``, where
    it is there, must have ``counts`` on its diagonal.

    Raises:
        ValueError: it is not one, or is of another model.
    """
    described = Fields(
        str(file.with_suffix(".json")), "", read_json(file.with_suffix(".json"))
    )
    described.choice("format", (RECORDING_FORMAT,))
    for key, wanted in (
        ("version", RECORDING_VERSION),
        ("num_experts", num_experts),
        ("top_k", top_k),
    ):
        if described.integer(key) != wanted:
            raise described.fail(
                key, f"must be {wanted} here; got {described.integer(key)}."
            )
    try:
        with np.load(file) as arrays:
            counts = arrays["counts"]
            pairs = arrays.get("coactivations")
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: is no recording: {error}.") from error
    if counts.ndim != 2 or counts.shape[1] != num_experts or (counts < 0).any():
        raise ValueError(
            f"{file}: counts must be [layers, {num_experts}] from 0 on; got "
            f"{list(counts.shape)}."
        )
    if pairs is not None and (
        pairs.shape != (*counts.shape, num_experts)
        or (np.diagonal(pairs, axis1=1, axis2=2) != counts).any()
    ):
        raise ValueError(
            f"{file}: coactivations must be [layers, {num_experts}, {num_experts}] "
            "with counts on the diagonal."
        )
    chances = chances_of(counts.astype(np.float64), top_k, str(file))
    # With one expert per token, or a diagonal alone, nothing says what goes together.
    if pairs is None or pairs.sum() == counts.sum():
        return Recorded(chances, None)
    return Recorded(chances, pairs.astype(np.float64))


def chances_of(weights: np.ndarray, top_k: int, where: str) -> np.ndarray:
    """The chance that a token takes each expert: in proportion to the weights, K in
    all, and none above 1: what is over goes to the others.
    """
    if ((weights > 0).sum(axis=1) < top_k).any():
        raise ValueError(
            f"{where}: at least {top_k} experts of a layer must have a weight above 0."
        )
    chances = np.zeros_like(weights)
    for row, out in zip(weights, chances):
        free = row > 0
        left = float(top_k)
        while True:
            out[free] = row[free] / row[free].sum() * left
            over = free & (out > 1)
            if not over.any():
                break
            out[over] = 1.0
            free &= ~over
            left = top_k - float((out[~free]).sum())
    return chances
