"""`logit_bias` of a batch: all rows at once, as mlx-lm adds each."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors

from mlx_ep.server.requests import Request, Sampling
from mlx_ep.server.sampling import SequenceSampler, draw_all

BIASES: list[dict[int, float]] = [{}, {3: 20.0, 1: -5.0}, {3: -1000.0}, {}, {0: 1e-3}]


@pytest.mark.parametrize("penalty", [0.0, 1.7])
def test_each_row_has_its_own(penalty: float) -> None:
    mx.random.seed(3)
    logits = mx.random.normal((len(BIASES), 6))
    samplers = [
        SequenceSampler(
            Request(
                str(row),
                (3, 4),
                4,
                Sampling(
                    logit_bias=bias,
                    repetition_penalty=penalty,
                    logprobs=True,
                    top_logprobs=6,
                ),
            )
        )
        for row, bias in enumerate(BIASES)
    ]
    # Biases alone leave nothing to be done row by row.
    assert any(s.changes_logits for s in samplers) == (penalty != 0)
    drawn = draw_all(logits, samplers, [[3, 4]] * len(BIASES))
    for row, bias in enumerate(BIASES):
        expected = logits[row : row + 1]
        for process in make_logits_processors(bias, penalty):
            expected = process(mx.array([3, 4]), expected)
        expected = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
        assert drawn.tokens[row].item() == mx.argmax(expected).item()
        _, ids, values = drawn.details[row]
        assert mx.array_equal(values, expected[0, ids])
