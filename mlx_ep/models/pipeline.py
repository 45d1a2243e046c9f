"""A model whose layers are stages on other ranks: found and cut by its structure.

Every rank keeps the model's own code and its list of layers as long as it is. Layers of
other stages are stand-ins without weights, which hand on what they get and count its
tokens in their cache: masks are made of the first layer's cache, on every rank. The
last stand-in before the stage's own layers receives, the first one behind them sends.
What leaves the last layer goes to all ranks, so that each has the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

from mlx_ep.models.stage_layer import StandInLayer

_Change = Callable[[mx.array], mx.array]


@runtime_checkable
class StagePeers(Protocol):
    """What connects the stages; see `mlx_ep.comm.stages.StageLink`."""

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    def receive(self, like: mx.array) -> mx.array: ...

    def send(self, x: mx.array) -> mx.array: ...

    def share(self, x: mx.array) -> mx.array: ...


def layer_list(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The path and the list of a model's layers.

    Raises:
        ValueError: it keeps them in another way.
    """
    layers = list(getattr(model, "layers", []))
    for path, module in model.named_modules():
        for name, value in module.items():
            is_long = isinstance(value, list) and 0 < len(layers) == len(value)
            if is_long and all(a is b for a, b in zip(value, layers)):
                return f"{path}.{name}".lstrip("."), value
    raise ValueError(
        f"--pp needs a model whose layers are one list; {type(model).__module__} keeps "
        "them in another way. Leave --pp out."
    )


def keep_layers(model: nn.Module, start: int, stop: int) -> None:
    """Put stand-ins in the place of all layers but ``start..stop-1``, in place."""
    _, layers = layer_list(model)
    for index, layer in enumerate(layers):
        if not start <= index < stop:
            layers[index] = _stand_in(layer)


def connect_stages(model: nn.Module, link: StagePeers) -> None:
    """Let the hidden states of a model that `keep_layers` cut go through `link`.

    Raises:
        ValueError: more than hidden states goes from layer to layer.
    """
    _, layers = layer_list(model)
    own = [i for i, each in enumerate(layers) if not isinstance(each, StandInLayer)]
    changes: dict[int, list[_Change]] = {}
    if link.index > 0:
        changes.setdefault(own[0] - 1, []).append(link.receive)
    if link.index < link.count - 1:
        changes.setdefault(own[-1] + 1, []).append(link.send)
    changes.setdefault(len(layers) - 1, []).append(link.share)
    for index, of_layer in changes.items():
        layer = layers[index]
        vars(layer)["behind"] = of_layer  # not where nn.Module has parameters
        layer.__class__ = _behind_class(type(layer))


def without_other_layers(
    path: str, start: int, stop: int, weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """A model's weights without those of layers other than ``start..stop-1``.

    Args:
        path: of its list of layers.
    """

    def is_held(name: str) -> bool:
        number, _, _ = name.removeprefix(f"{path}.").partition(".")
        of_layer = name.startswith(f"{path}.") and number.isdecimal()
        return not of_layer or start <= int(number) < stop

    return {name: array for name, array in weights.items() if is_held(name)}


def check_hidden_states(model: nn.Module, run: Callable[[], object]) -> None:
    """Whether hidden states are all that goes from layer to layer.

    Args:
        model: with all layers; left as it was.
        run: a forward pass of it, that need not be evaluated.

    Raises:
        ValueError: something else does, which a stage could not hand on.
    """
    _, layers = layer_list(model)
    classes = [type(layer) for layer in layers]
    seen: list[tuple[Any, Any]] = []
    for layer in layers:
        layer.seen = seen.append
        layer.__class__ = _seen_class(type(layer))
    try:
        run()
    finally:
        for layer, kind in zip(layers, classes, strict=True):
            layer.__class__ = kind
            del layer.seen
    is_plain = len(seen) == len(layers) and all(
        isinstance(given, mx.array)
        and isinstance(output, mx.array)
        and (output.shape, output.dtype) == (given.shape, given.dtype)
        for given, output in seen
    )
    if not is_plain or any(a[1] is not b[0] for a, b in pairwise(seen)):
        raise ValueError(
            "--pp needs layers that hand on hidden states and nothing else, which "
            f"those of {type(model).__module__} do not. Leave --pp out."
        )


def _stand_in(layer: nn.Module) -> nn.Module:
    """What code around a layer may look at, without its weights."""
    made = _bare(layer, _stand_in_class(type(layer)))
    for name, child in layer.items():
        if isinstance(child, nn.Module):
            made[name] = _bare(child, nn.Module)
    return made


def _bare(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    made: nn.Module = kind.__new__(kind)
    vars(made).update(vars(module))
    return made


@cache
def _stand_in_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        given = [*args, *kwargs.values()]
        x = _hidden(args, kwargs)
        for each in given:
            count_tokens(each, x.shape[0], x.shape[1])
        return x

    body = {"__call__": call, "__module__": layer_class.__module__}
    return type(f"StandIn{layer_class.__name__}", (StandInLayer, layer_class), body)


@cache
def _behind_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        x: mx.array = layer_class.__call__(self, *args, **kwargs)
        for change in self.behind:
            x = change(x)
        return x

    body = {"__call__": call, "__module__": layer_class.__module__}
    return type(f"Linked{layer_class.__name__}", (layer_class,), body)


@cache
def _seen_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = layer_class.__call__(self, *args, **kwargs)
        self.seen((_hidden(args, kwargs), output))
        return output

    return type(layer_class.__name__, (layer_class,), {"__call__": call})


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def count_tokens(cache: Any, batch: int, num_tokens: int) -> None:
    """Let a cache have seen so many tokens more, of which it keeps nothing."""
    if type(cache) is KVCache:
        if cache.keys is None:
            cache.keys = cache.values = mx.zeros((batch, 1, 0, 0))
        cache.offset += num_tokens
    elif isinstance(cache, ArraysCache):
        cache.advance(num_tokens)
    elif hasattr(cache, "caches"):
        for inner in cache.caches:
            count_tokens(inner, batch, num_tokens)
    elif hasattr(cache, "update_and_fetch"):
        nothing = mx.zeros((batch, 1, num_tokens, 0))
        cache.update_and_fetch(nothing, nothing)
        # Without a history, which nobody would ever evaluate.
        cache.keys = mx.zeros(cache.keys.shape)
        cache.values = mx.zeros(cache.values.shape)
