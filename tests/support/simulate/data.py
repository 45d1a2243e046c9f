"""Small models, clusters, bundles and traces, made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
DENSE = {
    key: value
    for key, value in MOE.items()
    if "expert" not in key and key not in ("moe_intermediate_size", "norm_topk_prob")
} | {"model_type": "qwen3"}
MODELS = {"tiny/moe": MOE, "tiny/dense": DENSE}


def instance(**changes: Any) -> dict[str, Any]:
    """An instance of a cluster file; 0.001 GiB leave some 1000 KV blocks."""
    return {
        "model_name": "tiny/moe",
        "hardware": "TINY",
        "npu_mem": {"mem_size": 0.01, "mem_bw": 100, "mem_latency": 0},
        "pd_type": None,
        "tp_size": 1,
    } | changes


def cluster(*instances: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A cluster file of one node."""
    return {
        "num_nodes": 1,
        "link_bw": 16,
        "link_latency": 2000,
        "nodes": [
            {
                "num_instances": len(instances),
                "cpu_mem": {"mem_size": 8, "mem_bw": 50, "mem_latency": 0},
                "instances": list(instances),
            }
        ],
    } | changes


def two_members(**changes: Any) -> dict[str, Any]:
    """Two instances that share their experts."""
    one = instance(ep_size=2, dp_group="A", **changes)
    return cluster(one, dict(one))


def make_folder(folder: Path, **clusters: dict[str, Any]) -> Path:
    """models/, perf/ and one cluster file each."""
    for name, config in MODELS.items():
        file = folder / "models" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config))
        write_bundle(folder / "perf" / "TINY" / name / "bf16", "expert" in str(config))
    for name, content in clusters.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def attention_us(
    chunk: float | int, before: float | int, decodes: float | int, keys: float | int
) -> float:
    """Linear in each of its numbers, so that interpolation is exact on any grid."""
    return (
        2 + 0.05 * chunk + 0.002 * before + decodes * (0.4 + 0.003 * keys) + (chunk > 0)
    )


def write_bundle(folder: Path, is_moe: bool) -> None:
    """A bundle whose times are simple functions, for tp1 and tp2."""
    layers = ["embedding", "layernorm", "qkv_proj", "qk_norm", "rotary_emb", "o_proj"]
    layers += ["final_layernorm"] + ([] if is_moe else ["gate_up_proj", "act_fn"])
    layers += [] if is_moe else ["down_proj"]
    tokens = [1, 2, 4, 8, 16, 64, 256, 512]
    for tp in (1, 2):
        own = folder / f"tp{tp}"
        own.mkdir(parents=True, exist_ok=True)
        lines = ["layer,tokens,time_us"]
        for place, layer in enumerate(layers):
            lines += [f"{layer},{t},{(1 + place + 0.1 * t) / tp}" for t in tokens]
        (own / "dense.csv").write_text("\n".join(lines) + "\n")
        lines = ["layer,sequences,time_us"]
        for layer, each in (("lm_head", 0.3), ("sampler", 0.1)):
            lines += [f"{layer},{n},{5 / tp + each * n}" for n in (1, 8, 64)]
        (own / "per_sequence.csv").write_text("\n".join(lines) + "\n")
        lines = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
        for chunk in (0, 16, 128, 512):
            for before in (0, 64, 512) if chunk else (0,):
                for decodes in (0, 1, 8, 32):
                    for keys in (16, 128, 1024) if decodes else (0,):
                        if chunk or decodes:
                            time = attention_us(chunk, before, decodes, keys)
                            lines.append(f"{chunk},{before},{decodes},{keys},{time}")
        (own / "attention.csv").write_text("\n".join(lines) + "\n")
        lines = ["pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples"]
        lines += [
            f"{chunk},n<=8,sr<=40%,kvB<=1k,kp=0,{alpha},1"
            for chunk, alpha in ((0, 0.5), (16, 0.25), (128, 0.25), (512, 0.25))
        ]
        (own / "skew_fit.csv").write_text("\n".join(lines) + "\n")
    if is_moe:
        lines = ["tokens,activated_experts,time_us"]
        for t in tokens:
            lines += [
                f"{t},{e},{3 + 2 * e + 0.05 * t}" for e in (2, 4, 8, 16) if e <= 2 * t
            ]
        (folder / "tp1" / "moe.csv").write_text("\n".join(lines) + "\n")


def trace_lines(
    count: int,
    *,
    seed: int = 0,
    gap_ns: float = 2e6,
    inputs: tuple[int, int] = (1, 200),
    outputs: tuple[int, int] = (1, 60),
    ids: bool = False,
    sessions: bool = False,
) -> list[dict[str, Any]]:
    """Random requests; with ids, many begin alike."""
    chosen = random.Random(seed)
    now, lines = 0.0, []
    prefix = [chosen.randrange(250) for _ in range(400)]

    def request() -> dict[str, Any]:
        n, m = chosen.randint(*inputs), chosen.randint(*outputs)
        found: dict[str, Any] = {"input_toks": n, "output_toks": m}
        if ids:
            shared = chosen.randrange(n + 1)
            rest = [chosen.randrange(250) for _ in range(n - min(shared, 400))]
            found["input_tok_ids"] = prefix[: n - len(rest)] + rest
            found["output_tok_ids"] = [chosen.randrange(250) for _ in range(m)]
        return found

    for index in range(count):
        now += chosen.expovariate(1 / gap_ns)
        if sessions and index % 3 == 0:
            pause = chosen.randrange(10_000_000)
            steps = [request() | {"tool_duration_ns": pause} for _ in range(3)]
            lines.append(
                {
                    "session_id": f"s{index}",
                    "arrival_time_ns": int(now),
                    "sub_requests": steps,
                }
            )
        else:
            lines.append(request() | {"arrival_time_ns": int(now)})
    return lines


def write_trace(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
