"""What a step takes by a hardware profile of this package and its cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_ep.config import OverlapMode
from mlx_ep.cost.overlap import StepParts, hidden_by_halves, hidden_by_shared
from mlx_ep.cost.profile import Profile
from mlx_ep.cost.shape import ModelShape
from mlx_ep.cost.step import mac_seconds, step_cost
from mlx_ep.simulate.cluster import Instance
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.times.tables import bracket_one

# Numbers of tokens at which the cost model is asked; between them lines.
_GRID = sorted(
    {1, 2, 3, *(2**i for i in range(2, 18)), *(3 * 2**i for i in range(1, 16))}
)
# A prompt with fewer tokens is not cut in two (mlx_ep.models.two_batch).
LEAST_PROMPT = 16
# Arms of the cost model in which ranks hold tokens of their own.
_SHARDED = {"gathered": "ep-gathered", "all_to_all": "ep-all-to-all"}


class ProfileTimes:
    """Steps of a group of instances on the hardware of a profile.

    mlx-lm's batches, and so this package's, run prompts and single tokens one after
    another: a step is one forward of its single tokens, one that fills the caches of
    its prompts (and leaves out what lies behind the last of them), and one for the
    last token of the prompts that end. Around it is the loop over batches.

    Args:
        group: instances that step together.
        profile: of the slowest device.
        shape: of the model.
        exchange: ``replicated``: attention is whole on every device, also on one, which
            then runs this package's experts and not mlx-lm's own block;
            ``all_to_all`` and ``gathered`` go with a dp_group. Else attention is split.
        link: of the profile; None: its first.
        overlap: what hides exchanges; ``auto``: of each forward the way that takes
            least.

    Raises:
        ValueError: the cost model has no such instances.
    """

    def __init__(
        self,
        group: Sequence[Instance],
        profile: Profile,
        shape: ModelShape,
        exchange: str = "allgather",
        link: str | None = None,
        overlap: OverlapMode = "none",
    ) -> None:
        first = group[0]
        self._overlap = overlap
        self._profile, self._shape, self._link = profile, shape, link
        self._ranks = first.tp
        self._spread = 1
        if first.pp > 1:
            raise ValueError(
                f"{first.where}.pp_size: the cost model has no pipeline stages; must "
                f"be 1 with a profile, got {first.pp}."
            )
        if first.ep > first.tp:
            if first.tp > 1:
                raise ValueError(
                    f"{first.where}.tp_size: with a profile, instances of a dp_group "
                    f"that share experts must have tp_size 1; got {first.tp}."
                )
            self._spread = self._ranks = len(group)
            self.arm = _SHARDED.get(exchange, "ep-gathered")
        elif first.tp == 1:
            self.arm = "ep-replicated" if exchange == "replicated" else "single"
        elif first.ep == 1:
            self.arm = "tp"
        elif first.ep == first.tp:
            self.arm = "ep-replicated" if exchange == "replicated" else "ep-tensor"
        else:
            raise ValueError(
                f"{first.where}.ep_size: with a profile, must be 1 or tp_size "
                f"({first.tp}); got {first.ep}."
            )
        if overlap != "none" and self.arm in ("single", "tp"):
            raise ValueError(
                f"{first.where}: --overlap {overlap} needs experts that this package "
                f"exchanges; with arm {self.arm} mlx-lm's own blocks run. Use "
                "--overlap none, or --expert-exchange replicated."
            )
        self._placement = first.placement
        self._heads_over = self._ranks if self.arm in ("tp", "ep-tensor") else 1
        self._found: dict[tuple[int, bool], StepParts] = {}
        self._mac_seconds = mac_seconds(profile, shape)

    def stage_ns(
        self, batches: Sequence[StepBatch], steps: int, first_step: int
    ) -> np.ndarray:
        """See `mlx_ep.simulate.group.StepTimes`; one stage."""
        filled = [batch for batch in batches if batch.num_tokens]
        profile = self._profile
        ended = [_ended(batch) for batch in filled]
        single = max(len(batch.decodes) for batch in filled)
        last = max(ended)
        filling = max(b.prefill_tokens - e for b, e in zip(filled, ended))
        making = max(len(b.decodes) + e for b, e in zip(filled, ended))
        scores = np.array([self._scores(batch, steps) for batch in filled])  # on host
        prefill, decode = scores.max(axis=0)
        total = scores.sum(axis=1).max(axis=0)
        # Each weight of the head is one of `width` that make a logit.
        logits = self._shape.head.weights / self._shape.layer.width
        each = profile.sequence_seconds + logits * profile.logit_seconds
        total = total + profile.loop_seconds + making * each
        looped = profile.loop_layer_seconds * self._shape.num_layers
        prompts = max(len(batch.prefills) for batch in filled)
        middle = filling // prompts // 2 * prompts if prompts else 0
        if filling < LEAST_PROMPT * prompts:
            middle = 0
        for tokens, wanted, first, own in (
            (single, single, single // 2, decode),
            (last, last, last // 2, np.zeros(steps)),
            (filling, 0, middle, prefill),
        ):
            if tokens:
                total = total + looped + self._body(tokens, wanted, first, own)
        return np.rint(total * 1e9).astype(np.int64)[None]

    def _body(
        self, tokens: int, logits: int, first: int, scores: np.ndarray
    ) -> np.ndarray | float:
        """Seconds of everything but scores and values of a forward; with no logits,
        of one that only fills caches.

        Args:
            first: tokens of the first micro-batch, where it can be cut; else 0.
            scores: ``[steps]`` s of the scores, which hide exchanges too.
        """
        whole = self._parts(tokens, bool(logits))
        seconds = whole.seconds
        if self._overlap in ("two", "auto"):
            # Beside the batch, the pass agrees on its mode and both halves' tokens,
            # whether it is then cut or not. Two halves below count two agreements.
            seconds += whole.agreement
        ways: list[np.ndarray | float] = []
        if self._overlap in ("none", "auto"):
            ways.append(seconds)
        if self._overlap != "none":  # what cannot be cut runs as with single
            ways.append(seconds - hidden_by_shared(whole))
        if self._overlap in ("two", "auto") and first:
            one = self._parts(first, bool(logits))
            other = self._parts(tokens - first, bool(logits))
            each = scores / self._shape.num_layers
            share = first / tokens
            hidden = hidden_by_halves(one, other, (share * each, (1 - share) * each))
            in_two = one.seconds + other.seconds - hidden
            ways = [in_two] if self._overlap == "two" else [*ways, in_two]
        return ways[0] if len(ways) == 1 else np.min(np.broadcast_arrays(*ways), axis=0)

    def _parts(self, tokens: int, has_logits: bool) -> StepParts:
        """Between two numbers of tokens that the cost model is asked for, a line."""
        low, weight = bracket_one(_GRID, tokens)
        parts = self._at(_GRID[low], has_logits)
        if not weight:
            return parts
        return parts.between(self._at(_GRID[low + 1], has_logits), weight)

    def _at(self, tokens: int, has_logits: bool) -> StepParts:
        """A step of so many single tokens without context."""
        key = (tokens, has_logits)
        if key not in self._found:
            cost = step_cost(
                self._profile,
                self._shape,
                self.arm,
                tokens=tokens * self._spread,
                phase="decode",
                num_ranks=self._ranks,
                logits=None if has_logits else 0,
                link=self._link,
                placement=self._placement,
            )
            parts = StepParts.of(cost, self._shape.num_layers)
            if self.arm == "ep-tensor":  # shared experts are split: the sum is of both
                parts = replace(parts, shared=0.0)
            self._found[key] = parts
        return self._found[key]

    def _scores(self, batch: StepBatch, steps: int) -> np.ndarray:
        """``[2, steps]`` s of prompts and of single tokens: read the caches, or
        compute, whichever takes longer.

        Without the key of each token itself, which is in `_body`.
        """
        later = np.arange(steps)
        total: np.ndarray = np.zeros((2, steps))
        for chunk, before in batch.prefills:
            seen = before + (chunk - 1) / 2
            total[0] += self._of(1, chunk, seen, before + chunk - 1)
        if batch.decodes:
            count = len(batch.decodes)
            # mlx-lm's caches for batches are as wide as the longest sequence.
            keys = max(batch.decodes) + later - 1
            total[1] += self._of(count, count, keys, keys)
        return total

    def _of(
        self,
        caches: int,
        queries: int,
        seen: np.ndarray | float | int,
        held: np.ndarray | float | int,
    ) -> np.ndarray:
        """Seconds of queries that see so many keys, in caches that hold so many."""
        shape, profile = self._shape, self._profile
        whole = shape.attention_macs - shape.window_macs
        macs = whole * seen + shape.window_macs * np.minimum(seen, shape.window)
        kept = shape.kv_bytes - shape.window_kv_bytes
        num_bytes = kept * held + shape.window_kv_bytes * np.minimum(held, shape.window)
        num_bytes = num_bytes + shape.state_bytes
        if shape.kv_is_split:
            num_bytes = num_bytes / self._heads_over
        length = queries // caches
        unseen = queries * (length - 1) / 2 * shape.attention_macs
        single, prompt, beyond = self._mac_seconds
        computing = queries * macs * (single if length == 1 else prompt)
        if length > 1:  # `_body` takes a token's own key for one of a single query
            computing = computing + queries * shape.attention_macs * (prompt - single)
        computing = (computing + unseen * beyond) / self._heads_over
        reading = caches * num_bytes / profile.memory_bandwidth
        return np.asarray(np.maximum(computing, reading))  # on host


def _ended(batch: StepBatch) -> int:
    """Prompts that end in this step: what makes a token and is no single one."""
    return min(max(len(batch.making) - len(batch.decodes), 0), len(batch.prefills))
