"""On a CPU, from how many tokens on is NumPy's BLAS faster than MLX, and by how much?

One MoE layer of random weights in the shape of Qwen3-30B-A3B (E=128, D=2048, F=768,
K=8, affine 4 bit in groups of 64), float32 rows, one core: mlx-lm's SwitchGLU and the
gate-weighted sum over K, as the model computes them, against the runner `blas` with the
same weights and routing.

    python -m benchmarks.bench_experts --check
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.harness import (
    Samples,
    Target,
    arguments,
    finish,
    heading,
    interleaved,
    ratio,
    run_pinned,
)
from mlx_ep.metrics import markdown_table

NUM_EXPERTS, WIDTH, EXPERT_WIDTH, TOP_K = 128, 2048, 768, 8
GROUP_SIZE, BITS = 64, 4
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_TOKENS = (1, 4, 16, 64)
QUICK_EXPERTS = 16
TARGET_TOKENS, TARGET_RATIO = 256, 5.0
ERROR_LIMIT = 1e-4  # of the largest output; both sum in float32


def on_rank(
    group: mx.distributed.Group, num_experts: int, counts: list[int], samples: int
) -> dict[str, Any]:
    """Samples and differences by number of tokens; what the warm-up predicts."""
    from mlx_lm.models.switch_layers import SwitchGLU

    from mlx_ep.experts import switch_runner
    from mlx_ep.rows import Option
    from mlx_ep.tune import Choice, ExpertsProblem, Layer, measure

    mx.random.seed(0)
    switch = SwitchGLU(WIDTH, EXPERT_WIDTH, num_experts)
    nn.quantize(switch, GROUP_SIZE, BITS)
    mx.eval(switch.parameters())
    blas = switch_runner(switch).runner("blas")
    by_tokens = {}
    for num_tokens in counts:
        arms, difference = _arms(switch, blas, num_experts, num_tokens)
        by_tokens[num_tokens] = (interleaved(arms, samples, warmup=1), difference)

    options = Option("gather", "cpu"), Option("blas", "cpu")
    layer = Layer(switch, mx.float32, TOP_K)
    problem = ExpertsProblem(layer, num_experts, num_ranks=1)
    found = measure(problem, options)
    choice = Choice(problem.title, options, {}, found, (), False, problem)
    predicted = {t: [choice.predicted(o, t) for o in options] for t in counts}
    crossover = choice.crossover(options[1], options[0])
    return {"by_tokens": by_tokens, "predicted": predicted, "crossover": crossover}


def _arms(
    switch: nn.Module, blas: Any, num_experts: int, num_tokens: int
) -> tuple[dict[str, Callable[[], None]], float]:
    """The two ways for one routing, and their largest difference, relative."""
    from mlx_ep.metrics import Counters
    from mlx_ep.types import Rows

    random = np.random.default_rng(num_tokens)
    order = np.argsort(random.random((num_tokens, num_experts)), axis=1)
    ids = mx.array(order[:, :TOP_K].astype(np.int32))
    gates = mx.random.uniform(shape=ids.shape)
    x = mx.random.normal((num_tokens, WIDTH))
    mx.eval(x, ids, gates)

    def mlx_lm() -> mx.array:
        return (switch(x, ids) * gates[..., None]).sum(axis=-2)

    def ours() -> mx.array:
        return blas.partial_sum(Rows(x, ids, gates), Counters())

    expected, got = mlx_lm(), ours()
    difference = mx.abs(expected - got).max() / mx.abs(expected).max()
    arms = {"SwitchGLU": lambda: mx.eval(mlx_lm()), "blas": lambda: mx.eval(ours())}
    return arms, difference.item()


def crossover_of(ratios: dict[int, Samples]) -> int | None:
    """The T from which on blas was always the faster one; None: it never was."""
    found = None
    for num_tokens in sorted(ratios, reverse=True):
        if ratios[num_tokens].median <= 1.0:
            break
        found = num_tokens
    return found


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=5).parse_args()
    num_experts = QUICK_EXPERTS if args.quick else NUM_EXPERTS
    counts = list(QUICK_TOKENS if args.quick else TOKENS)
    print(heading("Experts on a CPU: NumPy's BLAS against mlx-lm's SwitchGLU"))
    (found,) = run_pinned(1, on_rank, num_experts, counts, args.samples, timeout=3600.0)
    records, rows, ratios = [], [], {}
    for num_tokens, (samples, difference) in found["by_tokens"].items():
        plain, blas = samples["SwitchGLU"], samples["blas"]
        speedup = ratios[num_tokens] = ratio(plain, blas)
        predicted = found["predicted"][num_tokens]
        records.append(
            {
                "tokens": num_tokens,
                "experts": num_experts,
                "SwitchGLU": plain.seconds,
                "blas": blas.seconds,
                "speedup": speedup.median,
                "difference": difference,
                "predicted": predicted,
            }
        )
        rows.append(
            [
                num_tokens,
                plain.text("ms"),
                blas.text("ms"),
                f"{speedup.median:.2f}",
                f"{speedup.quartiles[0]:.2f} .. {speedup.quartiles[1]:.2f}",
                f"{difference:.1e}",
                f"{predicted[0] * 1e3:.3g} / {predicted[1] * 1e3:.3g}",
            ]
        )
    print(
        f"E={num_experts}, D={WIDTH}, F={EXPERT_WIDTH}, K={TOP_K}, affine {BITS} bit, "
        f"groups of {GROUP_SIZE}, float32 rows, one core. {args.samples} samples per "
        "arm, in turn.\n"
    )
    headers = [
        "T", "SwitchGLU", "blas", "speedup", "quartiles", "difference",
        "predicted ms",
    ]  # fmt: skip
    print(markdown_table(headers, rows))
    crossover = crossover_of(ratios)
    print(
        f"\nCrossover: blas is the faster one from T = {crossover} on (measured), from "
        f"T = {found['crossover']} on (as the warm-up predicts, a power of two).\n"
    )
    largest = max(record["difference"] for record in records)
    targets = [Target("largest relative difference", largest, ERROR_LIMIT)]
    if TARGET_TOKENS in ratios:
        name = f"speedup over SwitchGLU at T={TARGET_TOKENS}"
        value = ratios[TARGET_TOKENS].median
        targets.append(Target(name, value, TARGET_RATIO, at_least=True))
    last = max(ratios)
    figure = (
        f"blas over SwitchGLU at T={last}: {ratios[last].median:.1f} x; crossover at "
        f"T={crossover}"
    )
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    sys.exit(main())
