"""The router against NumPy, and against the routers of mlx-lm."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.deepseek_v3 import group_expert_select

from mlx_ep.moe import TopKRouter

T, D, E = 9, 12, 8


def sorted_by_id(routing):
    ids, gates = np.array(routing.expert_ids), np.array(routing.gates)
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(gates, order, 1)


def reference(logits, top_k, score, renormalize, scale, bias=None):
    logits = logits.astype(np.float64)
    if score == "softmax":
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores if bias is None else scores + bias
    ids = np.sort(np.argsort(-choice, axis=1)[:, :top_k], axis=1)
    gates = np.take_along_axis(scores, ids, 1)
    if renormalize:
        gates /= gates.sum(1, keepdims=True)
    return ids, gates * scale


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_choice_and_gates(score, renormalize, dtype, use_bias):
    mx.random.seed(1)
    options = {"score_function": score, "renormalize": renormalize}
    router = TopKRouter(D, E, 3, scaling_factor=2.5, use_bias=use_bias, **options)
    if use_bias:
        router.bias = mx.random.normal((E,))
    x = mx.random.normal((T, D)).astype(dtype)
    routing = router(x)
    assert routing.expert_ids.dtype == mx.int32 and routing.gates.dtype == mx.float32
    logits = np.array(x.astype(mx.float32)) @ np.array(router.weight).T
    bias = np.array(router.bias) if use_bias else None
    ids, gates = reference(logits, 3, score, renormalize, 2.5, bias)
    got_ids, got_gates = sorted_by_id(routing)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_allclose(got_gates, gates, rtol=1e-5)


def test_groups_as_in_deepseek_v3():
    mx.random.seed(2)
    router = TopKRouter(
        D, E, 2, score_function="sigmoid", use_bias=True, num_groups=4, top_groups=2
    )
    router.bias = mx.random.uniform(0, 1, (E,))  # mlx-lm masks with 0, so not below it
    x = mx.random.normal((T, D))
    expected = group_expert_select(x @ router.weight.T, router.bias, 2, 4, 2, 1.0, True)
    ids, gates = sorted_by_id(router(x))
    order = np.argsort(np.array(expected[0]), axis=1)
    np.testing.assert_array_equal(
        ids, np.take_along_axis(np.array(expected[0]), order, 1)
    )
    found = np.take_along_axis(np.array(expected[1]), order, 1)
    np.testing.assert_allclose(gates, found, rtol=1e-4)


def test_groups_without_a_bias_count_their_best():
    router = TopKRouter(1, 6, 2, num_groups=3, top_groups=1, renormalize=False)
    # Group 1 has the best expert; group 0 has the larger sum.
    logits = mx.log(mx.array([[0.2, 0.2, 0.3, 0.05, 0.15, 0.1]]))
    ids, gates = sorted_by_id(router.select(logits))
    assert ids.tolist() == [[2, 3]]
    np.testing.assert_allclose(gates, [[0.3, 0.05]], rtol=1e-5)


def test_a_group_outside_is_never_chosen_whatever_the_bias():
    router = TopKRouter(1, 4, 2, use_bias=True, num_groups=2, top_groups=1)
    router.bias = mx.array([-5.0, -5.0, -9.0, -9.0])
    ids, _ = sorted_by_id(router.select(mx.zeros((1, 4))))
    assert ids.tolist() == [[0, 1]]


def test_soft_cap():
    router = TopKRouter(1, 2, 2, soft_cap=2.0, score_function="sigmoid")
    router.renormalize = False
    router.weight = mx.array([[100.0], [0.5]])
    _, gates = sorted_by_id(router(mx.ones((1, 1))))
    expected = 1 / (1 + np.exp(-2 * np.tanh(np.array([50.0, 0.25]))))
    np.testing.assert_allclose(gates[0], expected, rtol=1e-5)


def test_gates_of_hopeless_scores_are_numbers():
    router = TopKRouter(1, 3, 2, score_function="sigmoid")
    gates = router.select(mx.full((1, 3), -200.0)).gates
    assert mx.isfinite(gates).all()


def test_no_tokens():
    routing = TopKRouter(D, E, 3, num_groups=2, top_groups=1)(mx.zeros((0, D)))
    assert routing.expert_ids.shape == routing.gates.shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k must be 1 to 8.*got 9"),
        ({"top_k": 0}, "got 0"),
        ({"top_k": 3, "num_groups": 4, "top_groups": 1}, "top_k must be 1 to 2"),
        ({"top_k": 2, "num_groups": 3}, "divide the experts; got 3 groups and 8"),
        ({"top_k": 2, "num_groups": 2, "top_groups": 3}, "top_groups must be 1 to"),
        ({"top_k": 2, "soft_cap": 0.0}, "soft_cap must be above 0"),
    ],
)
def test_wrong_numbers_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(D, E, **options)
