"""A tiny random model for every mlx-lm architecture with experts, and its measurement.

architectures.json holds a configuration per model type: 10 experts, which neither 3 nor
4 ranks divide, 3 of them per token, and widths that differ from one another.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_model

import mlx_ep
from mlx_ep.config import EPConfig
from mlx_ep.models import block_form, find_moe_sites, keep_experts, stack_experts
from tests.support import tiny
from tests.support.hub_layouts import HUB_LAYOUTS
from tests.support.metal_stand_in import metal_stand_in

ARCHITECTURES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text()
)

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}

# 68 tokens at once take mlx-lm's sorted path, also at one expert per token (llama4);
# single ones its unsorted path.
PROMPT = np.random.default_rng(0).integers(2, tiny.VOCABULARY, 72)
NUM_STEPS = 4


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a tiny model.

    Attributes:
        form: ``float32`` or ``4-bit``, as mlx-lm saves it, or ``hub``, float32 in the
            layout of the architecture's checkpoints on the hub.
    """

    name: str
    form: str
    folder: Path

    @property
    def expected(self) -> np.ndarray:
        """The logits of mlx-lm in one process."""
        return np.load(self.folder / "expected.npy")

    def error(self, found: np.ndarray) -> float:
        """How far logits are from those that float32 gives, relative, over all."""
        exact = np.load(self.folder / "float32.npy")
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    @property
    def is_half(self) -> bool:
        """Whether it is not in float32, and has float32's logits beside its own."""
        return (self.folder / "float32.npy").exists()


@dataclass(frozen=True)
class Measured:
    """What a rank saw of one checkpoint.

    Attributes:
        error: why it cannot run, or "".
        difference: the largest of a logit to mlx-lm's in one process.
        half_error: of a checkpoint in half precision, see `Saved.error`.
        digest: of the logits' bits.
        tiers: of its MoE blocks, see `BlockForm.tier`.
        in_block: whether the blocks' own code adds the ranks' parts.
        reasons: why blocks are not in the tier ``routed``.
        warned: whether a warning said that K outputs per token travel.
        computed: (token, expert) pairs that this rank computed.
        routed: all of them.
        layer_calls: MoE layers entered.
        collectives: those of the MoE layers.
    """

    error: str = ""
    difference: float = np.inf
    half_error: float = 0.0
    digest: str = ""
    tiers: list[str] = field(default_factory=list)
    in_block: bool = False
    reasons: list[str] = field(default_factory=list)
    warned: bool = False
    read_bytes: int = 0
    held_bytes: int = 0
    computed: int = 0
    routed: int = 0
    layer_calls: int = 0
    collectives: int = 0


def model_file(config: dict[str, Any]) -> str:
    """The name of the mlx-lm file that is loaded for a configuration."""
    # Not the model's class, which some files take from another one.
    _, args_class = _get_classes(dict(config))
    return args_class.__module__.rpartition(".")[2]


def moe_files() -> set[str]:
    """The mlx-lm files whose models have routed experts, told from their source.

    A file has them if it makes the stacked experts (or, as dbrx, a list of them), or
    builds on a file that does.
    """
    folder = Path(mlx_lm.models.__path__[0])
    sources = {file.stem: file.read_text() for file in folder.glob("*.py")}
    makes = re.compile(r"(?<!class )Switch(GLU|MLP)\(|self\.experts = \[")
    found = {name for name, source in sources.items() if makes.search(source)}
    imports = {name: _imports(source) for name, source in sources.items()}
    while True:
        more = {name for name, others in imports.items() if others & found} - found
        if not more:
            return found
        found |= more


def _imports(source: str) -> set[str]:
    """The other files of mlx_lm.models that a file imports."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    here = [node for node in nodes if node.level == 1]
    return {node.module for node in here if node.module} | {
        alias.name for node in here if not node.module for alias in node.names
    }


def make_model(config: dict[str, Any], seed: int = 1) -> nn.Module:
    """A model whose tokens spread over all experts, without parameters that are 0."""
    model = tiny.make_model(config, seed)
    zeros = [
        (name, mx.random.normal(p.shape) * 0.1)
        for name, p in tree_flatten(model.parameters())
        if mx.issubdtype(p.dtype, mx.floating) and not mx.any(p).item()
    ]
    model.load_weights(zeros, strict=False)
    return model


def few_forms(name: str) -> list[str]:
    """The forms of an architecture with float32 in one layout only."""
    return [f for f in forms(name) if f != "float32" or name not in HUB_LAYOUTS]


def forms(name: str) -> list[str]:
    """The forms that an architecture is saved in."""
    found = ["float32"]
    if "quantization" not in ARCHITECTURES[name]:  # else it is quantized already
        found.append("4-bit")
    if name in HUB_LAYOUTS:
        found.append("hub")
    return found


def save_all(
    folder: Path, names: Iterable[str], forms_of: Callable[[str], list[str]] = forms
) -> list[Saved]:
    """Checkpoints of architectures, in some forms each, with the expected logits."""
    tokenizer = tiny.make_tokenizer()
    saved = []
    for name in names:
        for form in forms_of(name):
            one = Saved(name, form, folder / f"{name}-{form}")
            _save(one)
            tokenizer.save_pretrained(one.folder)
            saved.append(one)
    return saved


def _save(one: Saved) -> None:
    config = {**deepcopy(ARCHITECTURES[one.name]), "eos_token_id": 1}
    model = make_model(config)
    if one.form == "4-bit":
        model, config = quantize_model(model, config, **AFFINE)
    one.folder.mkdir(parents=True)
    if one.form == "hub":
        weights = HUB_LAYOUTS[one.name](dict(tree_flatten(model.parameters())))
        mx.save_safetensors(str(one.folder / "model.safetensors"), weights)
    else:
        save_model(one.folder, model)
    (one.folder / "config.json").write_text(json.dumps(config))
    with metal_stand_in():
        model, _ = load_model(one.folder)
        np.save(one.folder / "expected.npy", logits(model))


def logits(model: nn.Module) -> np.ndarray:
    """The logits of a prompt, and of single tokens behind it, as float32."""
    cache = make_prompt_cache(model)
    tokens = mx.array(PROMPT)[None]
    steps = [tokens[:, :-NUM_STEPS]]
    steps += [tokens[:, i : i + 1] for i in range(len(PROMPT) - NUM_STEPS, len(PROMPT))]
    found = mx.concatenate([model(step, cache=cache) for step in steps], 1)[0]
    return np.array(found.astype(mx.float32))


def effect_of_experts(config: dict[str, Any]) -> list[float]:
    """Per expert, the largest change of a logit when it returns 0 in every layer."""
    model = stack_experts(make_model(config))
    expected = logits(model)
    sites = find_moe_sites(model)
    effects = []
    for expert in range(sites[0].num_experts):
        without = stack_experts(make_model(config))
        kept = mx.arange(sites[0].num_experts) != expert
        for site in find_moe_sites(without):
            keep_experts(
                site, lambda p, kept=kept: p * kept.reshape(-1, *[1] * (p.ndim - 1))
            )
        effects.append(float(np.abs(logits(without) - expected).max()))
    return effects


@dataclass(frozen=True)
class Job:
    """Checkpoints to load and run in one way.

    Attributes:
        tier: the best that blocks may have: those above it are not looked for.
    """

    saved: list[Saved]
    tier: str = "routed"
    config: EPConfig = EPConfig()  # noqa: RUF009, it is frozen


def measure(group: mx.distributed.Group, jobs: list[Job]) -> list[list[Measured]]:
    """Load checkpoints on this rank, one after another, and run them."""
    results = []
    for job in jobs:
        with metal_stand_in(), _best_tier(job.tier):
            results.append([_measure(group, one, job.config) for one in job.saved])
    return results


@contextmanager
def _best_tier(tier: str) -> Iterator[None]:
    names = ("find_probe", "find_partial_sum")[: block_form.TIERS.index(tier)]
    before = {name: getattr(block_form, name) for name in names}
    for name in names:
        setattr(block_form, name, lambda *_: (None, "it was not looked for"))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(block_form, name, function)


def _measure(group: mx.distributed.Group, one: Saved, config: EPConfig) -> Measured:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, _ = mlx_ep.load(str(one.folder), group, config)
        found = logits(model)
    except (ValueError, RuntimeError) as error:  # on all ranks alike
        return Measured(error=f"{type(error).__name__}: {error}")
    state = model.expert_parallel
    report = state.reports[group.rank()]
    forms = [block.form for block in state.blocks]
    return Measured(
        difference=float(np.abs(found - one.expected).max()),
        half_error=one.error(found) if one.is_half else 0.0,
        digest=hashlib.sha256(found.tobytes()).hexdigest(),
        tiers=sorted({form.tier for form in forms}),
        in_block=any(form.partial_sum and form.partial_sum.in_block for form in forms),
        reasons=sorted({form.why_not_routed for form in forms} - {""}),
        warned=any("K outputs per token travel" in str(w.message) for w in caught),
        read_bytes=report.read_bytes,
        held_bytes=report.held_bytes,
        computed=state.counters.pairs_computed,
        routed=state.counters.pairs_routed,
        layer_calls=state.counters.layer_calls,
        collectives=state.counters.collectives,
    )
