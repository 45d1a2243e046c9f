"""What a step takes however small the model is: from tiny models of mlx-lm.

As in `mlx_ep.measure.costs`, every function must be called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import qwen3, qwen3_moe
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.measure.costs import TINY
from mlx_ep.measure.timer import Timer

FEW_LAYERS, MANY_LAYERS = 2, 10
SEQUENCES = 16  # the second batch, which tells apart what grows with sequences
VOCABULARY = 8192  # the second one, which tells apart what grows with logits
_ENOUGH = 1 << 20  # tokens of a sequence: it does not end while it is timed


def fixed_times(
    timer: Timer, dtype: mx.Dtype, weight_seconds: float, call_seconds: float
) -> dict[str, float]:
    """What a step, a layer and a routed block take however small the model is.

    From decode steps of tiny models of mlx-lm with few and with more layers, without
    what other numbers of a profile account for.

    Args:
        weight_seconds: of a weight of the tiny model's matrices, for one row.
        call_seconds: of its experts, which the routed block calls.
    """
    steps = timer.longer().together(
        {
            (kind, layers): _decode_step(tiny_model(kind, layers, dtype))
            for kind in ("dense", "moe")
            for layers in (FEW_LAYERS, MANY_LAYERS)
        }
    )
    layer, routed = (
        max(0.0, steps[kind, MANY_LAYERS] - steps[kind, FEW_LAYERS])
        / (MANY_LAYERS - FEW_LAYERS)
        for kind in ("dense", "moe")
    )
    step = max(0.0, steps["dense", FEW_LAYERS] - FEW_LAYERS * layer)
    matrices = (4 + 3) * TINY**2  # of the attention and the feed-forward part
    return {
        "layer_seconds": max(0.0, layer - matrices * weight_seconds),
        "step_seconds": step,
        "block_seconds": max(0.0, routed - layer - call_seconds),
    }


def loop_times(timer: Timer, dtype: mx.Dtype) -> dict[str, float]:
    """What a loop over batches adds to the forward step, to each layer of it, each
    sequence in it and each of its logits.

    mlx-lm's BatchGenerator (masks, sampling, log probabilities, handing out tokens)
    beside the same step alone, for one and for more sequences; it is what
    ``mlx_ep.generate --prompts-file`` runs.
    """
    models = {n: tiny_model("dense", n, dtype) for n in (FEW_LAYERS, MANY_LAYERS)}
    cases = ((FEW_LAYERS, 1), (MANY_LAYERS, 1), (FEW_LAYERS, SEQUENCES))
    steps = timer.longer().together(
        {
            (make, *case): make(models[case[0]], case[1])
            for case in cases
            for make in (_batch_step, _decode_step)
        }
        | {(_choose, n, SEQUENCES): _choose(n, SEQUENCES) for n in (TINY, VOCABULARY)}
    )
    one, deep, many = (
        steps[_batch_step, *case] - steps[_decode_step, *case] for case in cases
    )
    each = max(0.0, (many - one) / (SEQUENCES - 1))
    layer = max(0.0, (deep - one) / (MANY_LAYERS - FEW_LAYERS))
    few, all_ = (steps[_choose, n, SEQUENCES] for n in (TINY, VOCABULARY))
    return {
        "loop_seconds": max(0.0, one - each - FEW_LAYERS * layer),
        "loop_layer_seconds": layer,
        "sequence_seconds": each,
        "logit_seconds": max(0.0, (all_ - few) / (VOCABULARY - TINY) / SEQUENCES),
    }


def _decode_step(model: nn.Module, sequences: int = 1) -> Callable[[], None]:
    """A call that decodes one token of each sequence."""
    cache = make_prompt_cache(model)
    token = mx.zeros((sequences, 1), mx.int32)

    def run() -> None:
        # sync: this is what is timed.
        mx.eval(model(token, cache=cache))

    return run


def _batch_step(model: nn.Module, sequences: int) -> Callable[[], object]:
    """A call that does so in mlx-lm's loop over batches."""
    generator = BatchGenerator(model, prefill_batch_size=sequences)
    generator.insert([[1, 2]] * sequences, [_ENOUGH] * sequences)
    while not generator.next()[1]:  # the prompts
        pass
    return generator.next


def _choose(vocabulary: int, sequences: int) -> Callable[[], None]:
    """A call that takes log probabilities and the most likely of them."""
    logits = mx.random.normal((sequences, vocabulary))
    # sync: what is timed must not include making them.
    mx.eval(logits)

    def run() -> None:
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # sync: this is what is timed.
        mx.eval(scores, mx.argmax(scores, axis=-1))

    return run


def tiny_model(kind: str, layers: int, dtype: mx.Dtype) -> nn.Module:
    """A model of 64 numbers, ``dense`` or ``moe``."""
    config: dict[str, Any] = {
        "hidden_size": TINY,
        "num_hidden_layers": layers,
        "intermediate_size": TINY,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": TINY,
        "rms_norm_eps": 1e-6,
        "vocab_size": TINY,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }
    if kind == "dense":
        model: nn.Module = qwen3.Model(qwen3.ModelArgs(model_type="qwen3", **config))
    else:
        routed = {
            "num_experts": 16,
            "num_experts_per_tok": 1,  # as the call of `measure.experts` has
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": TINY,
            "norm_topk_prob": True,
        }
        args = qwen3_moe.ModelArgs(model_type="qwen3_moe", **config, **routed)
        model = qwen3_moe.Model(args)
    model.set_dtype(dtype)
    # sync: what is timed must not include making the model.
    mx.eval(model.parameters())
    return model
