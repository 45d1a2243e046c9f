"""What do the shipped profiles predict for speeds that others have published?

Nothing is measured: predicted against published, with the source of each figure and the
error. Rows whose figure went into a profile are marked "set": they are not predictions.
No constant was chosen to make a row come out right. exo's runs are predicted with
MLX_METAL_FAST_SYNCH=1, which exo sets; with which fence MLX alone was run is not said.

    python -m benchmarks.published_figures [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

from benchmarks.harness import arguments, finish
from benchmarks.published_models import GLM_5, gpt_oss_mxfp4, kimi_k2_3bit
from mlx_ep.cost.profile import Profile, find_profile, overridden, slowest
from mlx_ep.cost.shape import ModelShape, named_layer
from mlx_ep.cost.step import layer_cost, prefill_seconds, step_cost
from mlx_ep.loading.shape import model_shape
from mlx_ep.metrics import markdown_table
from mlx_ep.types import Packing

# mlx issue 4438: with MLX_METAL_FAST_SYNCH=1 a crossing takes about 4 us. The package
# never sets it, as it can hang the GPU; exo does on JACCL (exo issue 1666).
FAST_CROSSING = {"links.jaccl.crossing_seconds": 4e-6}
EXO_1468 = "exo issue 1468"
EXO_2070 = "exo issue 2070"
MLX_4509 = "mlx issue 4509"
OMLX_3118 = "omlx issue 3118"
KIMI_CARD = "model card of spicyneuron/Kimi-K2.6-MLX-3.3bit"


@dataclass(frozen=True)
class Figure:
    """A published number.

    Attributes:
        what: was measured.
        low, high: as published; one number where they are equal.
        unit: of both.
        source: where.
        predict: the same number from a shipped profile.
        kind: ``predicted``; ``set``: the figure went into the profile; ``other fence``:
            the same figure as another row, if it was measured with the default fence.
    """

    what: str
    low: float
    high: float
    unit: str
    source: str
    predict: Callable[[], float]
    kind: str = "predicted"

    def error(self, predicted: float) -> float:
        """Relative to the nearest published number; 0 within their range."""
        nearest = min(max(predicted, self.low), self.high)
        return predicted / nearest - 1


@cache
def glm_5() -> ModelShape:
    """With full attention, as exo ran it: the index was not used on Apple silicon."""
    shape = model_shape(GLM_5, name="GLM-5, MXFP8")
    return replace(shape, window=0, window_kv_bytes=0, window_macs=0)


@cache
def kimi() -> ModelShape:
    return model_shape(kimi_k2_3bit(), name="Kimi-K2.6, 3 bit")


@cache
def gpt_oss() -> ModelShape:
    return model_shape(gpt_oss_mxfp4(), name="gpt-oss-120b, MXFP4")


def m3_ultra(fast: bool = False) -> Profile:
    profile = find_profile("m3-ultra")
    return overridden(profile, FAST_CROSSING) if fast else profile


def decode(
    profile: Profile, model: ModelShape, arm: str, ranks: int, context: int = 0
) -> float:
    """Tokens a second of one sequence."""
    options = {"tokens": 1, "phase": "decode", "context": context, "num_ranks": ranks}
    return step_cost(profile, model, arm, **options).tokens_per_second


def prefill(
    profile: Profile, model: ModelShape, arm: str, ranks: int, prompt: int
) -> float:
    """Tokens a second of one prompt."""
    return prompt / prefill_seconds(profile, model, arm, prompt=prompt, num_ranks=ranks)


def gathered_milliseconds(tokens: int) -> float:
    """3 gather_qmm of a chain, top 8 of 288 experts of 4096 x 2048."""
    layer = named_layer("288,4096,2048,8", Packing.affine(4))
    cost = layer_cost(m3_ultra(), layer, "single", tokens=tokens)
    return 1e3 * (cost.experts + cost.fixed)


def two_macbooks(fast: bool) -> Profile:
    """M4 Max and M5 Max: all wait for the slower one."""
    profile = slowest([find_profile("m4-max"), find_profile("m5-max")])
    return overridden(profile, FAST_CROSSING) if fast else profile


def link_seconds(num_bytes: int) -> float:
    return m3_ultra().link("jaccl").seconds("all_reduce", num_bytes, 2)


def figures() -> list[Figure]:
    tok_s, found = "tok/s", []
    for ranks, empty, long, prompt in ((2, 18.3, 16.7, 233), (4, 23.7, 21.3, 363)):
        what = f"GLM-5 MXFP8, tp on {ranks} M3 Ultra over JACCL, fast fence"

        def decoded(context: int, ranks: int = ranks) -> float:
            return decode(m3_ultra(fast=True), glm_5(), "tp", ranks, context)

        def prefilled(ranks: int = ranks) -> float:
            return prefill(m3_ultra(fast=True), glm_5(), "tp", ranks, 10_000)

        found += [
            Figure(f"{what}: decode", empty, empty, tok_s, EXO_1468,
                   lambda d=decoded: d(0)),
            Figure(f"{what}: decode behind 10K tokens", long, long, tok_s, EXO_1468,
                   lambda d=decoded: d(10_000)),
            Figure(f"{what}: prefill of 10K tokens", prompt, prompt, tok_s, EXO_1468,
                   prefilled),
        ]  # fmt: skip
    one = "Kimi-K2.6 3.3 bit on one M3 Ultra"
    found += [
        Figure(f"{one}: decode behind 1K tokens", 21.4, 21.4, tok_s, KIMI_CARD,
               lambda: decode(m3_ultra(), kimi(), "single", 1, 1024)),
        Figure(f"{one}: prefill of 1K tokens", 223.6, 223.6, tok_s, KIMI_CARD,
               lambda: prefill(m3_ultra(), kimi(), "single", 1, 1024)),
        Figure("gpt-oss-120b on one M4 Max: decode", 80, 80, tok_s, EXO_2070,
               lambda: decode(find_profile("m4-max"), gpt_oss(), "single", 1)),
        Figure("gpt-oss-120b on one M5 Max: decode", 80, 89, tok_s, EXO_2070,
               lambda: decode(find_profile("m5-max"), gpt_oss(), "single", 1)),
        Figure("gpt-oss-120b, MLX tp on M4 Max and M5 Max, fast fence: decode", 98, 98,
               tok_s, EXO_2070,
               lambda: decode(two_macbooks(True), gpt_oss(), "tp", 2)),
        Figure("gpt-oss-120b, MLX tp on M4 Max and M5 Max, default fence: decode", 98,
               98, tok_s, EXO_2070,
               lambda: decode(two_macbooks(False), gpt_oss(), "tp", 2),
               kind="other fence"),
        Figure("gather_qmm, top 8 of 288, M=1, M3 Ultra", 0.292, 0.292, "ms", MLX_4509,
               lambda: gathered_milliseconds(1), kind="set"),
        Figure("gather_qmm, top 8 of 288, M=4, M3 Ultra", 0.836, 0.836, "ms", MLX_4509,
               lambda: gathered_milliseconds(4)),
        Figure("JACCL, small all_sum on 2 ranks", 27, 31, "us", OMLX_3118,
               lambda: 1e6 * link_seconds(4), kind="set"),
        Figure("JACCL, large all_sum on 2 ranks", 6.1, 6.5, "GB/s", OMLX_3118,
               lambda: 1e-9 * 2**30 / link_seconds(2**30), kind="set"),
    ]  # fmt: skip
    return found


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=1).parse_args()
    print(f"# Published figures and what the shipped profiles predict\n\n{__doc__}")
    rows, records, errors = [], [], []
    for figure in figures():
        predicted = figure.predict()
        error = figure.error(predicted)
        if figure.kind == "predicted":
            errors.append(abs(error))
        published = f"{figure.low:g}"
        if figure.high != figure.low:
            published += f" to {figure.high:g}"
        rows.append(
            [
                figure.what,
                f"{published} {figure.unit}",
                f"{predicted:.3g}",
                f"{error:+.0%}",
                figure.kind,
                figure.source,
            ]
        )
        record = {k: v for k, v in asdict(figure).items() if k != "predict"}
        records.append({**record, "predicted": predicted, "error": error})
    headers = ["figure", "published", "model", "error", "kind", "source"]
    print(markdown_table(headers, rows))
    print("\nModels, as built by mlx-lm from the values in published_models.py:\n")
    for shape in (glm_5(), kimi(), gpt_oss()):
        weights = shape.num_moe_layers * (
            shape.layer.num_experts * shape.layer.expert_weights
            + shape.layer.shared.weights
            + shape.layer.router.weights
        )
        weights += shape.attention.weights + shape.dense.weights + shape.head.weights
        print(
            f"- {shape.name}: {weights / 1e9:.0f} B parameters and "
            f"{shape.num_bytes / 1e9:.0f} GB without the table of embeddings, "
            f"{8 * shape.num_bytes / weights:.2f} bits each"
        )
    mean = sum(errors) / len(errors)
    figure_text = (
        f"published figures: mean absolute error {mean:.0%} over {len(errors)} "
        f"predictions, largest {max(errors):.0%}"
    )
    print()
    return finish(args, records, [], figure_text)


if __name__ == "__main__":
    sys.exit(main())
