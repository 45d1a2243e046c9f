"""Quantized as on the hub: two ranks against mlx-lm in one process.

MLX's CPU backend gathers matrices in float32 only: of unpacked bfloat16 and float16
experts the ranks' runner multiplies in float32, and so does mlx-lm's for these tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import architectures
from tests.support.quantizations import QUANTIZATIONS, WIDE, save
from tests.support.ranks import run_ranks

FEW = {
    "qwen3_moe": ["affine 3-bit, groups of 128", "bfloat16"],
    "gpt_oss": ["mxfp8"],
    "dbrx": ["nvfp4", "mixed"],
}
ALL = {name: list(QUANTIZATIONS) for name in WIDE}

# Of the largest logit.
TOLERANCE = 1e-5
# In half precision, where a router may choose another expert at a near-tie: how much
# farther from float32 the ranks may be than mlx-lm in one process is.
FARTHER = 1.25


@pytest.mark.requires("ranks")
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(FEW, id="few"),
        pytest.param(ALL, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_logits_are_those_of_one_process(
    tmp_path: Path, which: dict[str, list[str]]
) -> None:
    saved = [save(tmp_path, name, form) for name in which for form in which[name]]
    jobs = [architectures.Job(saved)]
    ranks = [jobs[0] for jobs in run_ranks(2, architectures.measure, jobs, timeout=800)]
    problems = []
    for one, measured in zip(saved, zip(*ranks, strict=True), strict=True):
        if one.is_half:
            limit = FARTHER * one.error(one.expected)
            worst = max(rank.half_error for rank in measured)
        else:
            limit = TOLERANCE * float(np.abs(one.expected).max())
            worst = max(rank.difference for rank in measured)
        errors = {rank.error for rank in measured} - {""}
        if errors or worst > limit or len({rank.digest for rank in measured}) > 1:
            problems.append(f"{one}: {worst:.1e} > {limit:.1e} {errors}")
            continue
        for rank in measured:
            assert rank.tiers == ["routed"], one
            assert rank.read_bytes <= 1.02 * rank.held_bytes, one
    assert not problems, "\n".join(problems)
