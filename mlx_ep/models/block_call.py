"""One call of a MoE block, run again with stubs in the place of some of its parts.

The block's own code runs, on a view of the block. The block itself is not touched, so
that its parameters, and other threads, see nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.models.ranks import Ranks

SHARED_NAMES = ("shared_experts", "shared_expert", "share_expert", "shared_mlp")

# Gives arrays, or what stands for them.
Stub = Callable[..., Any]
Reduce = Callable[[mx.array], mx.array]


# Stands for the ranks as a block's `sharding_group`. Of size 1, so that the block
# divides no other work among ranks than its experts; one for all blocks, since mlx.nn
# keeps every group that it has seen.
_RANKS = Ranks(0, 1)


class _Replaced:
    """A module of Python with other values for some of its names."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _with_reduce(function: Any, reduce: Reduce) -> Any:
    """`function`, whose ``mx.distributed.all_sum`` over `_RANKS` is `reduce`.

    The model's own call would run on the current stream, at the same time as the
    collectives of `communication_stream`, on the same sockets.
    """

    def all_sum(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
        if group is not _RANKS:
            return mx.distributed.all_sum(x, group=group, stream=stream)
        return reduce(x)

    names = dict(function.__globals__)
    for name, value in names.items():
        if value is mx:
            names[name] = _Replaced(
                mx, distributed=_Replaced(mx.distributed, all_sum=all_sum)
            )
    copy = FunctionType(
        function.__code__,
        names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class BlockView:
    """A block seen with stubs in the place of some children; it is not touched."""

    def __init__(
        self,
        block: nn.Module,
        block_class: type[nn.Module],
        stubs: dict[str, Any],
        reduce: Reduce | None,
    ) -> None:
        self._block, self._stubs, self._reduce = block, stubs, reduce
        vars(self).update(stubs)  # found without `__getattr__`
        self._call = self._own(block_class.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self, *args, **kwargs)

    def _own(self, function: Any) -> Any:
        return (
            function if self._reduce is None else _with_reduce(function, self._reduce)
        )

    def __getattr__(self, name: str) -> Any:
        block = self._block
        # Layers and arrays, which a module is a dictionary of: without its own Python.
        value = block[name] if name in block else getattr(block, name)
        if isinstance(value, MethodType) and value.__self__ is self._block:
            # Helpers must see the stubs too.
            return MethodType(self._own(value.__func__), self)
        return value

    def __getitem__(self, name: str) -> Any:
        return self._stubs[name] if name in self._stubs else self._block[name]

    def __contains__(self, name: str) -> bool:
        return name in self._block


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: the block, its class's own ``__call__``, the arguments.

    Attributes:
        switch_path: the attributes that lead from the block to its switch.
    """

    block: nn.Module
    block_class: type[nn.Module]
    switch_path: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def can_reduce(self) -> bool:
        """Whether the block's code has a reduction over ranks of its own."""
        return hasattr(self.block, "sharding_group")

    @property
    def child_names(self) -> list[str]:
        """The block's layers that are neither its switch nor shared experts."""
        others = (*SHARED_NAMES, self.switch_path[0])
        return [
            name
            for name, child in self.block.items()
            if isinstance(child, nn.Module) and name not in others
        ]

    def run(
        self,
        switch: Stub,
        shared: Stub | None = None,
        reduce: Reduce | None = None,
        children: Mapping[str, Stub] = MappingProxyType({}),
    ) -> mx.array:
        """The block's output with other parts; see `view`."""
        view = self.view(switch, shared, reduce, children)
        return view(*self.args, **self.kwargs)

    def view(
        self,
        switch: Stub,
        shared: Stub | None = None,
        reduce: Reduce | None = None,
        children: Mapping[str, Stub] = MappingProxyType({}),
    ) -> BlockView:
        """The block with other parts, to be called as the block is.

        Args:
            switch: in the place of its switch.
            shared: if given, in the place of its shared experts: called with the module
                and its argument.
            reduce: if given, in the place of the block's own sum over ranks, which it
                then does; else it does none.
            children: in the place of others of its layers.
        """
        stubs: dict[str, Any] = dict(children)
        if self.can_reduce:
            stubs["sharding_group"] = None if reduce is None else _RANKS
        if shared is not None:
            stubs |= {
                name: _Bound(shared, module)
                for name in SHARED_NAMES
                if isinstance(module := self.block.get(name), nn.Module)
            }
        *between, name = self.switch_path
        inner: Any = _SwitchStub(switch, self._switch)
        for depth in range(len(between), 0, -1):
            module = self.block
            for step in between[:depth]:
                module = module[step]
            inner = BlockView(module, type(module), {name: inner}, reduce)
            name = between[depth - 1]
        return BlockView(self.block, self.block_class, {**stubs, name: inner}, reduce)

    @property
    def _switch(self) -> nn.Module:
        module = self.block
        for name in self.switch_path:
            module = module[name]
        return module

    def run_until(self, child: str, switch: Stub, shared: Stub) -> mx.array:
        """What the block gives to one of its layers.

        Raises:
            ValueError: it never calls that layer.
        """

        def leave(x: mx.array, *_: Any) -> mx.array:
            raise _LeftError(x)

        try:
            self.run(switch, shared, children={child: leave})
        except _LeftError as left:
            return left.x
        raise ValueError(f"it does not call {child}")


class _LeftError(Exception):
    """A block has been run as far as was wanted."""

    def __init__(self, x: mx.array) -> None:
        self.x = x


class _SwitchStub:
    """A stub for a switch; muse_spark keeps a norm of the block's below its switch."""

    def __init__(self, stub: Stub, switch: nn.Module) -> None:
        self._stub, self._switch = stub, switch

    def __call__(self, x: mx.array, ids: mx.array) -> Any:
        return self._stub(x, ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._switch, name)


class _Bound:
    """A stub that knows what it stands for."""

    def __init__(self, stub: Stub, module: nn.Module) -> None:
        self.stub, self.module = stub, module

    def __call__(self, x: mx.array, *_: Any) -> mx.array:
        return self.stub(self.module, x)


class RandomExperts:
    """Random outputs in the place of the experts', the same at each call.

    Attributes:
        outputs: of the last call, ``[..., K, D]``.
    """

    outputs: mx.array

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        shape = (*ids.shape, x.shape[-1])
        key = mx.random.key(0)  # the model's own random state stays as it is
        self.outputs = mx.random.normal(shape, key=key).astype(x.dtype)
        return self.outputs


def zero_outputs(x: mx.array, ids: mx.array) -> mx.array:
    """What a switch returns when it has none of the experts, ``[..., K, D]``."""
    return mx.zeros((*ids.shape, x.shape[-1]), x.dtype)


def zero_column(module: nn.Module, x: mx.array) -> mx.array:
    """In the place of shared experts: nothing, of any width, ``[..., 1]``."""
    return mx.zeros((*x.shape[:-1], 1), x.dtype)


def tolerance(expected: mx.array) -> mx.array:
    """How far another order of sums may be from `expected`, by its dtype."""
    relative = 1e-4 if expected.dtype == mx.float32 else 3e-2
    return relative * mx.abs(expected).max()
