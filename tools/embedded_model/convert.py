"""Convert a checkpoint of train.py to mlx-lm's form. Needs mlx-lm, no PyTorch.

    python tools/embedded_model/convert.py checkpoint mlx_ep/embedded/jargon-moe

The weights go through `mlx_lm.convert` in float32; the configuration is written
with the flat names that mlx-lm and the published Qwen3-MoE models use.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mlx_lm.convert import convert

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with `rope_theta`, `num_experts` at the top level."""
    flat = dict(config)
    rope = flat.pop("rope_parameters")
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = None
    flat["num_experts"] = flat.pop("num_local_experts", flat.get("num_experts"))
    flat["torch_dtype"] = flat.pop("dtype", "float32")
    flat["use_cache"] = True
    return flat


def main() -> None:
    """Convert the checkpoint and copy the files of the model folder."""
    parser = argparse.ArgumentParser(description="Convert the embedded model.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        shutil.copytree(args.checkpoint, source)
        config = flat_config(json.loads((source / "config.json").read_text()))
        (source / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"],
            "do_sample": False,
        }
        text = json.dumps(generation, indent=2) + "\n"
        (source / "generation_config.json").write_text(text)

        result = Path(name) / "result"
        convert(str(source), str(result), dtype="float32")
        path = result / "tokenizer_config.json"
        tokenizer = json.loads(path.read_text())
        for key in ("is_local", "local_files_only"):
            tokenizer.pop(key, None)
        path.write_text(json.dumps(tokenizer, indent=2) + "\n")
        args.out.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            if (result / file).exists():
                (args.out / file).write_bytes((result / file).read_bytes())
    size = sum(f.stat().st_size for f in args.out.iterdir() if f.is_file())
    print(f"{args.out}: {size} bytes")


if __name__ == "__main__":
    main()
