"""Builds an mlx-lm model in which every switch holds this rank's experts only.

The hook is official: ``load_model(get_model_classes=...)``. The class it is given is a
subclass of the model's own that shrinks the switches when it is built, and whose
`sanitize` sees the checkpoint as if the model had only this rank's experts. So all that
mlx-lm does to a checkpoint (stacking, splitting, transposing, unpacking) happens to
local experts alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from mlx_ep.comm import shortened
from mlx_ep.loading.checkpoint import Checkpoint, TensorReader
from mlx_ep.loading.foreign import check_numbers, foreign_code
from mlx_ep.loading.headers import DTYPES, TensorInfo
from mlx_ep.loading.rank_tensors import rank_tensors
from mlx_ep.loading.widths import (
    cut_axis,
    holds_parts,
    is_bias_elsewhere,
    is_foreign_bias,
    keep_part,
    named_projections,
    parameter_cut,
    tensor_cut,
)
from mlx_ep.models import (
    find_moe_sites,
    keep_experts,
    keep_layers,
    layer_list,
    stack_experts,
    stack_quantization,
    stack_tensors,
    why_not_here,
    without_other_layers,
)
from mlx_ep.models.sites import EXPERT_COUNTS
from mlx_ep.placement import Placement

_MODEL_TYPE = re.compile(r"[\w.-]{1,100}")

# Something done to a model whose parameters are not evaluated yet.
Change = Callable[[nn.Module], None]


def model_class(config: dict[str, Any]) -> type[nn.Module]:
    """mlx-lm's class for a config.json.

    Raises:
        ValueError: mlx-lm has none, it cannot run here, its experts are quantized in
            a way that cannot be stacked, or the folder brings its own code.
    """
    if "model_file" in config:
        raise ValueError(
            "Models that bring their own code (config.json names a model_file, "
            f"{config['model_file']!r}) cannot be made expert-parallel."
        )
    if "model_type" not in config:
        raise ValueError("config.json must name a model_type.")
    kind = config["model_type"]
    if not (isinstance(kind, str) and _MODEL_TYPE.fullmatch(kind)):
        raise ValueError(
            "config.json must name a model_type of letters, digits, - and _; got "
            f"{shortened(repr(kind), 100)}."
        )
    with foreign_code(f"config.json does not describe a model of type {kind}"):
        found, _ = _get_classes(dict(config))
    if reason := why_not_here(found):
        raise ValueError(reason)
    with foreign_code(f"config.json does not describe a model of type {kind}"):
        stack_quantization(found, config)
    return found


def count_experts(config: dict[str, Any]) -> int:
    """E of a model, from the modules that its config.json makes; nothing is read.

    0: it is dense.

    Raises:
        ValueError: it has experts that mlx_ep cannot find.
    """
    sites = find_moe_sites(build_model(config))
    return sites[0].num_experts if sites else 0


def refuse_dense(num_experts: int, what: str) -> None:
    """Raises:
    ValueError: there are no experts, which `what` is about.
    """
    if num_experts == 0:
        raise ValueError(
            f"The model has no routed experts (it is dense), and {what} spreads or "
            "counts experts. mlx_ep.generate, chat and server run it, whole on every "
            "rank or, with --attention tensor, split by mlx-lm's own shard()."
        )


def build_model(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model for a config.json, with random weights that are not evaluated.

    Its experts are stacked, also where mlx-lm has them in another form.

    Raises:
        ValueError: config.json lacks a value that the model needs.
    """
    kind = shortened(repr(config.get("model_type")), 100)
    with foreign_code(f"config.json does not describe a model of type {kind}"):
        found, args_class = _get_classes(dict(config))
        # A copy: some from_dict change what they are given.
        return stack_experts(found(args_class.from_dict(deepcopy(config))))


def load_local(
    checkpoint: Checkpoint,
    placement: Placement,
    rank: int,
    reader: TensorReader,
    change: Change | None = None,
) -> nn.Module:
    """The model of a checkpoint with the experts of `rank`, evaluated.

    Dense tensors are read when they are evaluated, one parameter at a time, so that
    at most one parameter's inputs are held beside what stays.

    Args:
        change: what is done to the model before its dense tensors are read.
    """
    model, classes = _lazy_model(checkpoint, placement, rank, reader)
    if change is not None:
        change(model)
    for name in classes.read_by_mlx:
        reader.check(checkpoint.tensors[name])
    lazy_bytes = sum(
        info.num_bytes
        for info in checkpoint.tensors.values()
        if info.name in classes.read_by_mlx
    )
    parameters = dict(tree_flatten(model.parameters()))
    here = sum(parameter.nbytes for parameter in parameters.values())
    told = seen = 0
    for name, parameter in parameters.items():
        mx.eval(parameter)  # sync: loading
        check_numbers(name, parameter)
        # Of what MLX reads for a parameter nobody knows more than its part of all.
        seen += parameter.nbytes
        part = lazy_bytes * seen // max(here, 1)
        reader.advance(part - told)
        told = part
    mx.clear_cache()
    reader.bytes_read += lazy_bytes
    return model


def outline(checkpoint: Checkpoint, placement: Placement, rank: int) -> nn.Module:
    """As `load_local`, with nothing read and nothing evaluated.

    It has the shapes and dtypes that the model of `rank` will have, and no numbers.

    Raises:
        ValueError: the checkpoint's tensors are not those of the model: what is
            missing, too many or of another shape.
    """
    what = f"{checkpoint.path}: config.json and weights do not meet"
    with foreign_code(what), _ShapeReader() as reader:
        return _lazy_model(checkpoint, placement, rank, reader)[0]


class _ShapeReader(TensorReader):
    """Gives arrays of the right shapes that are never evaluated."""

    def _read(
        self,
        info: TensorInfo,
        spans: Sequence[tuple[int, int]],
        shape: tuple[int, ...],
        dtype: mx.Dtype | None = None,
    ) -> mx.array:
        return mx.zeros(shape, dtype or DTYPES[info.dtype])


def _lazy_model(
    checkpoint: Checkpoint, placement: Placement, rank: int, reader: TensorReader
) -> tuple[nn.Module, _LocalClasses]:
    classes = _LocalClasses(checkpoint, placement, rank, reader)
    changes = stack_quantization(model_class(checkpoint.config), checkpoint.config)
    model, _ = load_model(
        checkpoint.path, lazy=True, model_config=changes, get_model_classes=classes
    )
    model.__class__ = classes.model_class  # the subclass has done its work
    drop_placeholder(model, placement, rank)
    return model, classes


def shrink_switches(model: nn.Module, placement: Placement, rank: int) -> None:
    """Cut every switch of a model that is not evaluated yet to the rank's part.

    A rank without experts keeps one as a placeholder: mlx-lm cannot stack or quantize
    nothing. `drop_placeholder` takes it away.
    """
    num_slots = max(placement.num_slots(rank), 1)
    part = placement.part(rank)
    for site in find_moe_sites(model):
        keep_experts(site, lambda parameter: parameter[:num_slots])
        if part is not None:
            keep_part(site, part)


def drop_placeholder(model: nn.Module, placement: Placement, rank: int) -> None:
    """Leave the switches of a rank without experts empty."""
    if placement.num_slots(rank) == 0:
        for site in find_moe_sites(model):
            keep_experts(site, lambda p: mx.zeros((0, *p.shape[1:]), p.dtype))


class _LocalClasses:
    """What ``load_model`` asks for the model's classes, and what came of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        rank: int,
        reader: TensorReader,
    ) -> None:
        self.checkpoint, self.placement, self.rank = checkpoint, placement, rank
        self.reader = reader
        self.read_by_mlx: set[str] = set()
        self.layers_path = ""
        self.part = placement.part(rank)
        # Else experts are read whole, and cut when mlx-lm has split them.
        self.reads_parts = self.part is not None and holds_parts(
            checkpoint, placement.num_experts, self.part
        )

    def __call__(self, config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        self.model_class, args_class = _get_classes(config)
        model_class, loader = self.model_class, self

        class LocalModel(model_class):  # type: ignore[valid-type, misc]
            def __init__(self, args: Any) -> None:
                super().__init__(args)
                stack_experts(self)
                shrink_switches(self, loader.placement, loader.rank)
                if (stage := loader.placement.stage) is not None:
                    loader.layers_path, _ = layer_list(self)
                    keep_layers(self, stage.start, stage.stop)

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                weights = stack_tensors(model_class, loader.localize(weights))
                if hasattr(model_class, "sanitize"):
                    with _expert_count(self, loader.placement, loader.rank):
                        weights = super().sanitize(weights)
                if (stage := loader.placement.stage) is not None:
                    weights = without_other_layers(
                        loader.layers_path, stage.start, stage.stop, weights
                    )
                return loader.cut(self, weights)

        return LocalModel, args_class

    def localize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint with this rank's experts only, numbered by slot.

        Args:
            weights: lazy tensors by their names in the checkpoint.

        Returns:
            The dense tensors, still lazy, and this rank's experts: rows of stacks are
            read now, tensors of single experts stay lazy too.
        """
        experts = self.placement.rank_experts[self.rank]
        slots = {expert: slot for slot, expert in enumerate(experts)}
        local: dict[str, mx.array] = {}
        for info, kind, found, _, is_elsewhere in rank_tensors(
            self.checkpoint, self.placement, self.rank
        ):
            tensor = weights[info.name]
            if kind == "dense":
                local[info.name] = tensor
                if not is_elsewhere:
                    self.read_by_mlx.add(info.name)
            elif kind == "stack":
                held = () if is_elsewhere else experts
                local[info.name] = self._stack(info, held, max(len(experts), 1))
            elif found is None or found.expert is None:
                raise AssertionError(info.name)
            elif kind == "own":
                name = found.renamed(slots[found.expert])
                local[name] = tensor if is_elsewhere else self._single(info, tensor)
            elif found.expert == 0 and not experts:
                local[info.name] = self._nothing(info, info.shape)
        return local

    def _stack(
        self, info: TensorInfo, experts: Sequence[int], num_rows: int
    ) -> mx.array:
        """This rank's experts out of a stack, read now; none: rows of nothing."""
        if not experts or self._is_foreign_bias(info):
            return self._nothing(info, (num_rows, *info.shape[1:]))
        cut = tensor_cut(info, self.part) if self.part and self.reads_parts else None
        if cut is None:
            return self.reader.read_rows(info, experts)
        return self.reader.read_slice(info, experts, cut.axis, cut.range)

    def _single(self, info: TensorInfo, tensor: mx.array) -> mx.array:
        """A tensor of one of this rank's experts: lazy, unless a part of it is read."""
        if self._is_foreign_bias(info):
            return self._nothing(info, info.shape)
        cut = tensor_cut(info, self.part) if self.part and self.reads_parts else None
        if cut is None:
            self.read_by_mlx.add(info.name)
            return tensor
        return self.reader.read_slice(info, None, cut.axis, cut.range)

    def _nothing(self, info: TensorInfo, shape: tuple[int, ...]) -> mx.array:
        """In the place of a tensor that this rank has no use for."""
        array = mx.zeros(shape, DTYPES[info.dtype])
        cut = tensor_cut(info, self.part) if self.part and self.reads_parts else None
        return array if cut is None else cut.of(array)

    def _is_foreign_bias(self, info: TensorInfo) -> bool:
        return self.part is not None and is_foreign_bias(info, self.part)

    def cut(
        self, model: nn.Module, weights: dict[str, mx.array]
    ) -> dict[str, mx.array]:
        """The model's weights with this rank's part of the width of its experts.

        Args:
            model: whose switches are cut to that part already.
            weights: by the names of its parameters; experts whole, unless they were
                read so.
        """
        if self.part is None:
            return weights
        for site in find_moe_sites(model):
            for projection, _ in named_projections(site):
                path = f"{site.path}.{site.switch_name}.{projection}"
                for name in ("weight", "scales", "biases", "bias"):
                    array = weights.get(f"{path}.{name}")
                    if array is None:
                        continue
                    if is_bias_elsewhere(projection, name, self.part):
                        del weights[f"{path}.{name}"]
                        continue
                    if self.reads_parts:
                        continue
                    size = array.shape[cut_axis(projection, name)]
                    cut = parameter_cut(projection, name, size, self.part)
                    if cut is not None:
                        weights[f"{path}.{name}"] = cut.of(array)
        return weights


@contextmanager
def _expert_count(model: nn.Module, placement: Placement, rank: int) -> Iterator[None]:
    """The model's configuration says, for a while, that it has L experts, not E."""
    changed: list[tuple[Any, str]] = []
    # A dense model may say that it has 0 of them.
    for args in _configurations(model) if placement.num_experts else []:
        for name in EXPERT_COUNTS:
            if getattr(args, name, None) == placement.num_experts:
                changed.append((args, name))
                setattr(args, name, max(placement.num_slots(rank), 1))
    try:
        yield
    finally:
        for args, name in changed:
            setattr(args, name, placement.num_experts)


def _configurations(model: nn.Module) -> list[Any]:
    """Every configuration record that a module of the model holds, nested ones too."""
    found: list[Any] = []

    def visit(record: Any) -> None:
        if not is_dataclass(record) or any(record is other for other in found):
            return
        found.append(record)
        for field in fields(record):
            visit(getattr(record, field.name, None))

    for module in model.modules():
        visit(getattr(module, "args", None))
        visit(getattr(module, "config", None))
    return found
