"""Steps in which prompts and single tokens are passes of their own, as a server's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_ep.simulate.group import StepTimes
from mlx_ep.simulate.scheduler import StepBatch


class PassTimes:
    """Of times that know steps in which everything is one pass: the sum of two.

    Args:
        times: of such steps.
    """

    def __init__(self, times: StepTimes) -> None:
        self._times = times

    def stage_ns(
        self, batches: Sequence[StepBatch], steps: int, first_step: int
    ) -> np.ndarray:
        """See `mlx_ep.simulate.group.StepTimes`."""
        prompts = [StepBatch(prefills=batch.prefills) for batch in batches]
        single = [StepBatch(decodes=b.decodes, making=b.making) for b in batches]
        passes = [
            self._times.stage_ns(own, steps, first_step)
            for own in (single, prompts)
            if any(batch.num_tokens for batch in own)
        ]
        return np.asarray(np.sum(passes, axis=0))  # on host
