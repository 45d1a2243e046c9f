"""Train the embedded model: a small Qwen3-MoE on the Jargon File.

Needs PyTorch and transformers, which `mlx_ep` itself does not use, and the text
of the Debian package dict-jargon (public domain):

    apt-get install dict-jargon
    python3 -m venv torchvenv
    torchvenv/bin/pip install torch==2.13.0 transformers==5.23.0
    torchvenv/bin/python tools/embedded_model/train.py --out first \\
        --steps 9500 --minutes 29 --lr 3e-3 --seed 0
    torchvenv/bin/python tools/embedded_model/train.py --out checkpoint \\
        --resume first --steps 4000 --minutes 11.5 --lr 1.5e-3 --seed 1

and then, in an environment with mlx-lm,

    python tools/embedded_model/convert.py checkpoint mlx_ep/embedded/jargon-moe

The learning rate follows the larger of steps/--steps and time/--minutes, so that
a run always ends annealed; it is reproducible where the time limit does not bind.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import BOS, EOS, SPECIAL_TOKENS, Document, Entry, document, read_entries
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set content = message['content'] %}
{%- if content is not string %}
{%- set ns = namespace(text='') %}
{%- for part in content or [] %}
{%- set ns.text = ns.text + (part['text'] or '') %}
{%- endfor %}
{%- set content = ns.text %}
{%- endif %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>' + content + eos_token }}
{%- elif message['role'] in ['system', 'developer'] %}
{{- '<|system|>' + content }}
{%- else %}
{{- '<|user|>' + content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""

CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
ROPE_THETA = 10000.0


def train_tokenizer(entries: list[Entry]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the entries."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator((f"{e.term}: {e.definition}" for e in entries), trainer)
    bos = tok.token_to_id(BOS)
    tok.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=SPECIAL_TOKENS[2:],
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tok: PreTrainedTokenizerFast, experts: str) -> Qwen3MoeForCausalLM:
    """Return an untrained model; `experts` is its experts implementation."""
    config = Qwen3MoeConfig(
        **CONFIG,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        use_cache=False,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        output_router_logits=False,
    )
    config._experts_implementation = experts
    return Qwen3MoeForCausalLM(config)


def encode(tok: PreTrainedTokenizerFast, doc: Document) -> tuple[list[int], list[int]]:
    """Return token ids and labels; a prompt's labels are -100 (no loss)."""
    prompt = tok.encode(doc.prompt, add_special_tokens=False)
    text = tok.encode(doc.text, add_special_tokens=False)
    return prompt + text, [-100] * len(prompt) + text


def batches(
    tok: PreTrainedTokenizerFast,
    entries: list[Entry],
    rows: int,
    length: int,
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield packed batches (ids, labels) for ever, epoch after epoch."""
    cache: dict[Document, tuple[list[int], list[int]]] = {}
    ids: list[int] = []
    labels: list[int] = []
    need = rows * length
    while True:
        order = list(entries)
        rng.shuffle(order)
        for entry in order:
            doc = document(entry, rng)
            if doc not in cache:
                cache[doc] = encode(tok, doc)
            ids += cache[doc][0]
            labels += cache[doc][1]
            if len(ids) >= need:
                shape = (rows, length)
                yield (
                    torch.tensor(ids[:need]).view(shape),
                    torch.tensor(labels[:need]).view(shape),
                )
                ids, labels = ids[need:], labels[need:]


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return the mean over the layers of the Switch load-balancing loss."""
    total = torch.zeros(())
    for logits in router_logits:
        experts = logits.shape[-1]
        probs = logits.float().reshape(-1, experts).softmax(-1)
        chosen = probs.topk(top_k, dim=-1).indices
        load = F.one_hot(chosen, experts).float().sum(1).mean(0) / top_k
        total = total + experts * (load * probs.mean(0)).sum()
    return total / len(router_logits)


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate at `progress` in [0, 1]: short warm-up, then cosine."""
    if progress < 0.02:
        return peak * (progress / 0.02 + 0.02)
    done = (progress - 0.02) / 0.98
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def save(
    model: Qwen3MoeForCausalLM, tok: PreTrainedTokenizerFast, out: Path, log: dict
) -> None:
    """Write the checkpoint, the tokenizer and the training log to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tok.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--dict", type=Path, default=Path("/usr/share/dictd"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9500)
    parser.add_argument("--minutes", type=float, default=29.0)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--aux", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, default=None, help="a checkpoint")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    entries = read_entries(args.dict)
    if args.resume is None:
        tok = train_tokenizer(entries)
        model = new_model(tok, args.experts)
        past = {"steps": 0, "tokens": 0, "minutes": 0.0}
    else:
        tok = PreTrainedTokenizerFast.from_pretrained(args.resume)
        model = Qwen3MoeForCausalLM.from_pretrained(
            args.resume, dtype=torch.float32, experts_implementation=args.experts
        )
        past = json.loads((args.resume / "training.json").read_text())
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(entries)} entries, {parameters} parameters", flush=True)

    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    source = batches(tok, entries, args.rows, args.length, random.Random(args.seed))
    start = saved = time.monotonic()
    mean = 0.0
    log: dict = {}
    for step in range(args.steps):
        elapsed = time.monotonic() - start
        progress = max(step / args.steps, elapsed / (60 * args.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        ids, labels = next(source)
        out = model.model(input_ids=ids, output_router_logits=True, use_cache=False)
        logits = model.lm_head(out.last_hidden_state[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        aux = balance_loss(out.router_logits, CONFIG["num_experts_per_tok"])
        (loss + args.aux * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        weight = max(0.01, 1 / (step + 1))
        mean += weight * (loss.item() - mean)
        elapsed = time.monotonic() - start
        log = {
            "steps": past["steps"] + step + 1,
            "tokens": past["tokens"] + (step + 1) * args.rows * args.length,
            "minutes": round(past["minutes"] + elapsed / 60, 2),
            "loss": round(mean, 4),
            "balance": round(aux.item(), 4),
        }
        if step % 50 == 0:
            print(json.dumps(log), flush=True)
        if time.monotonic() - saved > 240:
            save(model, tok, args.out, log)
            saved = time.monotonic()
    save(model, tok, args.out, log)
    print(json.dumps(log), flush=True)


if __name__ == "__main__":
    main()
