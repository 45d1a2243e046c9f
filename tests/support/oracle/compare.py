"""transformers, mlx-lm in one process and mlx_ep on two ranks on the same checkpoints.

`python -m tools.oracle_table` writes what comes of it into docs/oracle.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

import mlx_ep
from tests.support import tiny
from tests.support.oracle.checkpoints import ARCHITECTURES, TOKENS
from tests.support.ranks import run_ranks

NUM_RANKS = 2
TOLERANCE = 1e-4  # of the largest logit

# What transformers has under the same name and what still cannot be compared.
CANNOT = {
    "bailing_hybrid": "transformers' `bailing_hybrid` is the architecture that mlx-lm "
    "has as BailingMoeV3, compared as `bailing_moe_v3`",
    "gemma4_unified": "transformers' `gemma4_unified` has no experts",
    "minimax": "transformers' `minimax` is MiniMax-Text-01, with linear attention; "
    "mlx-lm's is MiniMax-M2, compared as `minimax_m2`",
    "muse_spark": "parts of mlx-lm's model are Metal kernels; with plain MLX in their "
    "place (`tests/support/metal_stand_in.py`) the logits differ by 0.3 of the "
    "largest, for a reason that is not known yet",
    "qwen3_5": "transformers' `qwen3_5` has no experts; compared as `qwen3_5_moe`",
    "step3p5": "transformers has no text model of this type",
}
# What was made alike first, because mlx-lm and transformers differ there.
NOTES = {
    "deepseek_v32": "sparse attention over all tokens; of fewer the two pick others",
    "ernie4_5_moe": "correction bias 0: mlx-lm drops it",
    "glm_moe_dsa": "sparse attention over all tokens; of fewer the two pick others",
    "jamba": "all 10 experts chosen: mlx-lm makes the gates of the chosen ones add up "
    "to 1, transformers does not",
    "mimo_v2_flash": "a window of 17 for mlx-lm, 16 for transformers, which does not "
    "count the token itself",
    "nemotron_h": "the time steps' lower limit as mlx-lm's time_step_limit; "
    "transformers takes time_step_min",
    "nemotron_h_latent": "as `nemotron_h`",
    "phimoe": "2 experts per token: transformers' router knows no other number",
}


@dataclass(frozen=True)
class Row:
    """What came of one architecture; differences are parts of the largest logit.

    Attributes:
        problem: why there is no comparison, or "".
        scale: the largest logit of transformers.
        mlx_lm: mlx-lm in one process to transformers.
        mlx_ep: mlx_ep, the worst rank, to transformers.
        between: mlx_ep to mlx-lm.
    """

    name: str
    problem: str = ""
    scale: float = np.nan
    mlx_lm: float = np.nan
    mlx_ep: float = np.nan
    between: float = np.nan


def compare_all(
    folder: Path, names: tuple[str, ...] = tuple(ARCHITECTURES)
) -> list[Row]:
    """A row for each architecture, in order.

    Args:
        folder: where the checkpoints go.

    Raises:
        RuntimeError: transformers cannot be run here.
    """
    missing = _write(folder, [name for name in names if name not in CANNOT])
    found = [name for name in names if (folder / name / "logits.npy").exists()]
    one = {name: _one_process(folder / name) for name in found}
    ranks = run_ranks(NUM_RANKS, _on_a_rank, folder, found, timeout=1200)
    rows = []
    for name in names:
        if name not in found:
            rows.append(Row(name, CANNOT.get(name) or missing[name]))
            continue
        results = [one[name], *(rank[name] for rank in ranks)]
        rows.append(_row(name, np.load(folder / name / "logits.npy"), results))
    return rows


def _row(name: str, expected: np.ndarray, results: list[np.ndarray | str]) -> Row:
    scale = float(np.abs(expected).max())
    if problems := [result for result in results if isinstance(result, str)]:
        return Row(name, problems[0], scale)
    alone, *ranks = (np.asarray(result) for result in results)

    def difference(found: list[np.ndarray], to: np.ndarray) -> float:
        return max(float(np.abs(each - to).max()) for each in found) / scale

    return Row(
        name,
        scale=scale,
        mlx_lm=difference([alone], expected),
        mlx_ep=difference(ranks, expected),
        between=difference(ranks, alone),
    )


def _write(folder: Path, names: list[str]) -> dict[str, str]:
    """Write the checkpoints; why transformers cannot, by name."""
    command = [
        sys.executable,
        "-m",
        "tests.support.oracle.checkpoints",
        str(folder),
        *names,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            "the oracle needs PyTorch and transformers (make test-oracle installs "
            f"them):\n{done.stderr[-3000:]}"
        )
    tokenizer = tiny.make_tokenizer()
    for name in names:
        if (folder / name).exists():
            tokenizer.save_pretrained(folder / name)
    return json.loads((folder / "problems.json").read_text())


def _one_process(folder: Path) -> np.ndarray | str:
    try:
        model, _ = load_model(folder)
        return _logits(model)
    except (ValueError, RuntimeError) as error:
        return f"mlx-lm: {error}"


def _on_a_rank(
    group: mx.distributed.Group, folder: Path, names: list[str]
) -> dict[str, np.ndarray | str]:
    return {name: _load_and_run(group, folder / name) for name in names}


def _load_and_run(group: mx.distributed.Group, folder: Path) -> np.ndarray | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that K outputs travel
            model, _ = mlx_ep.load(str(folder), group)
        return _logits(model)
    except (ValueError, RuntimeError) as error:  # on all ranks alike
        return f"mlx_ep: {error}"


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)[None])[0].astype(mx.float32))
