"""Write the logits of a checkpoint under PyTorch, for check.py to compare.

Run as

    torchvenv/bin/python tools/embedded_model/reference.py checkpoint reference.npz

It answers one chat prompt greedily and stores the ids and their logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

PROMPT = "What is a hacker?"


def main() -> None:
    """Run one chat prompt and save its ids and logits."""
    parser = argparse.ArgumentParser(description="Write reference logits.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    tok = AutoTokenizer.from_pretrained(args.checkpoint)
    model = Qwen3MoeForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    messages = [{"role": "user", "content": PROMPT}]
    text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tok.encode(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(ids, max_new_tokens=48, do_sample=False)
        logits = model(ids).logits[0]
    np.savez(args.out, ids=ids[0].numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()
