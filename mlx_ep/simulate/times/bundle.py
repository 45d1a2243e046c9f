"""A bundle of measured kernels: the CSV files of one model on one device."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_ep.simulate.times.attention import AttentionTable, Skew
from mlx_ep.simulate.times.tables import Line, Surface

VARIANTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# In the order of a forward step; those of `PER_LAYER` run in every layer.
ONCE = ("embedding", "final_layernorm")
ATTENTION_LAYERS = ("qkv_proj", "qk_norm", "rotary_emb", "o_proj")
DENSE_MLP_LAYERS = ("gate_up_proj", "act_fn", "down_proj")
SEQUENCE_LAYERS = ("lm_head", "sampler")


@dataclass(frozen=True)
class Bundle:
    """Times in us of the kernels of a model whose layers are split `tp` ways.

    Attributes:
        dense: over tokens, by layer name.
        sequences: over sequences, by layer name.
        experts: over tokens and distinct experts, of a whole layer at TP 1.
    """

    folder: Path
    dense: dict[str, Line]
    sequences: dict[str, Line]
    attention: AttentionTable
    skew: Skew
    experts: Surface | None


def find_bundle(
    folders: Sequence[Path], hardware: str, model: str, dtype: str
) -> Path | None:
    """``<folder>/<hardware>/<model>/<variant>``, the first that is there."""
    variant = VARIANTS.get(dtype, dtype)
    for folder in folders:
        found = folder / hardware / model / variant
        if found.is_dir():
            return found
    return None


def read_bundle(folder: Path, tp: int, is_moe: bool) -> Bundle:
    """The bundle of a variant's folder for one TP degree.

    Raises:
        ValueError: there is none for this degree, or which file and line is wrong.
    """
    own = folder / f"tp{tp}"
    if not own.is_dir():
        there = sorted(path.name for path in folder.glob("tp*"))
        raise ValueError(
            f"{folder}: has no tp{tp}; it has {', '.join(there) or 'none'}."
        )
    experts = None
    if is_moe:
        rows = list(_rows(folder / "tp1" / "moe.csv", "", ("tokens", *_EXPERT_KEYS)))
        experts = Surface([(t, e, time) for _, (t, e, time) in rows])
    required = {*ONCE, "layernorm", *ATTENTION_LAYERS} - {"qk_norm"}
    if not is_moe:
        required |= set(DENSE_MLP_LAYERS)
    rows = list(_rows(own / "attention.csv", "", _ATTENTION_KEYS))
    return Bundle(
        folder=own,
        dense=_lines(own / "dense.csv", "tokens", required),
        sequences=_lines(own / "per_sequence.csv", "sequences", {"lm_head"}),
        attention=AttentionTable([(c, b, n, k, t) for _, (c, b, n, k, t) in rows]),
        skew=_skew(own / "skew_fit.csv", _default_alpha(folder / "meta.yaml", tp)),
        experts=experts,
    )


_EXPERT_KEYS = ("activated_experts", "time_us")
_ATTENTION_KEYS = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")


def _lines(file: Path, key: str, required: set[str]) -> dict[str, Line]:
    points: dict[str, list[tuple[float, float]]] = {}
    for layer, (number, time) in _rows(file, "layer", (key, "time_us")):
        points.setdefault(layer, []).append((number, time))
    if missing := sorted(required - set(points)):
        raise ValueError(f"{file}: has no layer {missing[0]}.")
    return {layer: Line(found) for layer, found in points.items()}


def _rows(
    file: Path, text: str, keys: tuple[str, ...]
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The text column (or "") and the numbers of each row.

    Raises:
        ValueError: the file, a column or a number is wrong.
    """
    for number, row in _dicts(file, (*([text] if text else []), *keys)):
        values = tuple(_number(row[key], file, number, key) for key in keys)
        yield row[text] if text else "", values


def _dicts(file: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            if missing := [k for k in keys if k not in (reader.fieldnames or ())]:
                raise ValueError(f"{file}: line 1: has no column {missing[0]}.")
            rows = list(enumerate(reader, 2))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error}.") from error
    if not rows:
        raise ValueError(f"{file}: has no rows.")
    yield from rows


def _number(text: str | None, file: Path, line: int, key: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or value < 0:
        raise ValueError(
            f"{file}: line {line}: {key} must be a number from 0 on; got {text!r}."
        )
    return value


def _default_alpha(file: Path, tp: int) -> float:
    """``alpha_default`` of a TP degree under ``skew_fit: per_tp``; 0 without one."""
    if not file.is_file():
        return 0.0
    is_own = False
    for line in file.read_text().splitlines():
        key, _, value = line.strip().partition(":")
        if key.isdigit() and not value:
            is_own = int(key) == tp
        if is_own and key == "alpha_default":
            return _signed(value.strip(), f"{file}: alpha_default")
    return 0.0


def _signed(text: str | None, where: str) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"{where} must be a number; got {text!r}.") from None


def _skew(file: Path, default: float) -> Skew:
    """No file: every sequence counts by the mean."""
    if not file.is_file():
        return Skew({})
    labels = ("n_label", "skew_rate_label", "kv_big_label", "kp_label")
    alphas = {}
    for number, row in _dicts(file, ("pc", *labels, "alpha")):
        n, share, longest, before = (row[label] for label in labels)
        alpha = _signed(row["alpha"], f"{file}: line {number}: alpha")
        alphas[_number(row["pc"], file, number, "pc"), n, share, longest, before] = (
            alpha
        )
    return Skew(alphas, default)
