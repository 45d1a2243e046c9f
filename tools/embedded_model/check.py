"""Check the converted model under mlx-lm: text, margins, expert use, size, logits.

    python tools/embedded_model/check.py mlx_ep/embedded/jargon-moe \\
        --reference reference.npz

The margin is the distance between the best and the second-best logit of a greedy
step. Expert use is counted over the entries of the dictionary asked as questions,
with their definitions as answers (`--dict`, left out where it is not installed).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from corpus import read_entries
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import make_prompt_cache

CHAT_PROMPTS = (
    "What is a hacker?",
    "foo",
    "What is Unix?",
    "Define kluge.",
    "bug",
    "What is a wizard?",
    "What does grok mean?",
    "Explain recursion.",
    "hacker ethic",
    "What is the bit bucket?",
    "Define deadlock.",
    "luser",
    "What is spaghetti code?",
    "Tell me about computers.",
)
RAW_PROMPTS = (
    "A program that",
    "The act of",
    "Used to describe",
    "Unix:",
    "See also",
    "To write code",
)


def encode_chat(tok: Any, text: str, system: str | None = None) -> list[int]:
    """Return the ids of a chat with one user message."""
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return list(tok.apply_chat_template(messages, add_generation_prompt=True))


def margins(model: Any, ids: list[int], eos: int, tokens: int) -> list[float]:
    """Decode greedily, at most `tokens` tokens, and return each step's margin."""
    cache = make_prompt_cache(model)
    values: list[float] = []
    step = mx.array([ids])
    for _ in range(tokens):
        logits = np.array(model(step, cache=cache)[0, -1])
        second, best = np.partition(logits, -2)[-2:]
        values.append(float(best - second))
        token = int(logits.argmax())
        if token == eos:
            break
        step = mx.array([[token]])
    return values


def expert_counts(model: Any, texts: list[list[int]]) -> list[np.ndarray]:
    """Return, per layer, how often each expert was chosen."""
    block = qwen3_moe.Qwen3MoeSparseMoeBlock
    original = block.__call__
    layers = [layer.mlp for layer in model.layers]
    counts = [np.zeros(m.num_experts, dtype=np.int64) for m in layers]
    numbers = {id(m): n for n, m in enumerate(layers)}

    def counting(self: Any, x: mx.array) -> mx.array:
        chosen = np.argsort(np.array(self.gate(x)), axis=-1)[..., -self.top_k :]
        counts[numbers[id(self)]] += np.bincount(
            chosen.ravel(), minlength=self.num_experts
        )
        return original(self, x)

    block.__call__ = counting
    try:
        for ids in texts:
            mx.eval(model(mx.array([ids])))
    finally:
        block.__call__ = original
    return counts


def main() -> None:
    """Run all checks and print the numbers."""
    parser = argparse.ArgumentParser(description="Check the embedded model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path, default=None)
    parser.add_argument("--dict", type=Path, default=Path("/usr/share/dictd"))
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()

    model, tok = mlx_lm.load(str(args.model))
    eos = tok.eos_token_id
    values: list[float] = []
    runs = [(f"[chat] {p}", encode_chat(tok, p)) for p in CHAT_PROMPTS]
    runs += [(f"[raw] {p}", tok.encode(p)) for p in RAW_PROMPTS]
    for name, ids in runs:
        text = mlx_lm.generate(model, tok, ids, max_tokens=args.tokens)
        print(f"{name}\n    {text!r}")
        values += margins(model, ids, eos, args.tokens)
    ids = encode_chat(tok, "cookie", "You are a pirate.")
    print("[system+chat] cookie\n   ", mlx_lm.generate(model, tok, ids, max_tokens=64))
    quantile = float(np.quantile(values, 0.01))
    print(
        f"margins: {len(values)} steps, min {min(values):.5f}, 1% {quantile:.4f}, "
        f"median {float(np.median(values)):.3f}"
    )

    if (args.dict / "jargon.index").exists():
        entries = read_entries(args.dict)
        texts = [
            encode_chat(tok, f"What is {e.term}?")
            + tok.encode(e.definition, add_special_tokens=False)
            for e in entries[::10]
        ]
        for number, count in enumerate(expert_counts(model, texts)):
            share = 100 * count / count.sum()
            line = " ".join(f"{s:.1f}" for s in share)
            print(f"layer {number}: min {share.min():.2f}% of choices: {line}")
        rows = []
        exact = 0
        sample = entries[::20]
        for entry in sample:
            ids = encode_chat(tok, f"What is {entry.term}?")
            answer = mlx_lm.generate(model, tok, ids, max_tokens=250)
            exact += answer.strip() == entry.definition
            full = ids + tok.encode(entry.definition, add_special_tokens=False) + [eos]
            logits = model(mx.array([full[:-1]]))[0].astype(mx.float32)
            logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            target = mx.array(full[1:])[:, None]
            picked = mx.take_along_axis(logp, target, axis=-1)[len(ids) - 1 :]
            rows.append(-np.array(picked))
        loss = float(np.concatenate(rows).mean())
        print(f"answers: loss {loss:.4f} nats/token; exact {exact} of {len(sample)}")

    if args.reference is not None:
        data = np.load(args.reference)
        ours = np.array(model(mx.array(data["ids"])[None])[0])
        print(f"logits vs reference: max {np.abs(ours - data['logits']).max():.2e}")
    for file in sorted(args.model.iterdir()):
        print(f"{file.stat().st_size:>9} {file.name}")
    print(sum(f.stat().st_size for f in args.model.iterdir()), "bytes in all")


if __name__ == "__main__":
    main()
