"""Shapes and types are checked where this package is called, once a kind of call.

jaxtyping's import hook wraps every function that it finds: it binds the arguments and
checks them twice at each call, and compiles a checker whenever a nested function is
made. That makes a decode step four times as long. Here

- a function without arrays is checked by beartype alone;
- one with arrays is checked where the types, shapes and dtypes of its arguments, or of
  its result, are others than before: alike, they would be found right again;
- a checker is made once for each piece of code, when that is first called: most of what
  is imported is not called in one process of the tests.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import update_wrapper
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
import mlx.core as mx
import numpy as np
from jaxtyping import AbstractArray

from tests.support.shape_memo import keep_apart

_jaxtyped = jaxtyping.jaxtyped
_MOST_ITEMS = 8  # of a tuple or list that are looked at


def make_cheaper() -> None:
    """For modules that jaxtyping's import hook loads from now on."""
    jaxtyping.jaxtyped = _checked
    keep_apart()


def install(packages: str | Sequence[str]) -> None:
    """Check these packages, as pytest's option `--jaxtyping-packages` does."""
    make_cheaper()
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def _checked(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """In the place of `jaxtyping.jaxtyped`."""

    def decorate(function: Any) -> Any:
        if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
            return _jaxtyped(typechecker=typechecker)(function)
        code = function.__code__  # functions of two modules may have equal ones
        checker = _checkers.get(id(code))
        if checker is None:
            checker = _checkers[id(code)] = _Checker(typechecker, code)
        return checker.around(function)

    return decorate


class _Pending(threading.local):
    """What the functions that are being checked in this thread really do."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []


_checkers: dict[int, _Checker] = {}
_pending = _Pending()
_unmade: list[Callable[[], Any]] = []  # checkers of functions that may not be called


def make_all() -> None:
    """Make all checkers now: processes forked from this one make none."""
    while _unmade:
        _unmade.pop()()


class _Checker:
    """Checks the calls of functions of one code."""

    def __init__(self, typechecker: Callable[..., Any], code: CodeType) -> None:
        self._typechecker = typechecker
        self._code = code  # kept: no other gets its id
        self._seen: set[Hashable] = set()
        self._has_shapes = False
        self._check: Callable[..., Any] | None = None

    def around(self, function: Any) -> Any:
        """The function, checked from its first call on."""
        checked: Callable[..., Any] | None = None

        def make() -> Callable[..., Any]:
            nonlocal checked
            if checked is None:
                checked = self._checked(function)
            return checked

        def call(*args: Any, **kwargs: Any) -> Any:
            return (checked or make())(*args, **kwargs)

        if "<locals>" not in function.__qualname__:
            _unmade.append(make)
        return update_wrapper(call, function)

    def _checked(self, function: Any) -> Callable[..., Any]:
        if self._check is None:
            self._has_shapes = _has_shapes(function)
            if not self._has_shapes and "<locals>" not in function.__qualname__:
                checked: Callable[..., Any] = self._typechecker(function)
                return checked
            self._check = self._make_check(function)
        seen, check = self._seen, self._check

        def call(*args: Any, **kwargs: Any) -> Any:
            kind = (_kind(args), tuple(kwargs), _kind(tuple(kwargs.values())))
            if kind not in seen:
                result = _run(check, lambda: function(*args, **kwargs), args, kwargs)
                seen.add(kind)
            else:
                result = function(*args, **kwargs)
                if (kind, _kind(result)) in seen:
                    return result
                _run(check, lambda: result, args, kwargs)
            seen.add((kind, _kind(result)))
            return result

        return call

    def _make_check(self, function: FunctionType) -> Callable[..., Any]:
        def stand_in(*_: Any, **__: Any) -> Any:
            return pending.calls.pop()()

        pending = _pending
        # The signature, and the names in it, are those of the function.
        own = FunctionType(
            stand_in.__code__, function.__globals__, closure=stand_in.__closure__
        )
        update_wrapper(own, function)
        if self._has_shapes:
            made: Callable[..., Any] = _jaxtyped(typechecker=self._typechecker)(own)
        else:
            made = self._typechecker(own)
        return made


def _run(
    check: Callable[..., Any], does: Callable[[], Any], args: Any, kwargs: Any
) -> Any:
    depth = len(_pending.calls)
    _pending.calls.append(does)
    try:
        return check(*args, **kwargs)
    finally:
        del _pending.calls[depth:]


def _kind(value: Any) -> Hashable:
    """What a check of a value looks at."""
    kind = type(value)
    if kind is mx.array or kind is np.ndarray:
        return (kind, tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return (kind, len(value), *map(_kind, value[:_MOST_ITEMS]))
    return kind


def _has_shapes(function: FunctionType) -> bool:
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # defined below, or for mypy alone
        return True
    return any(_is_shaped(hint) for hint in hints.values())


def _is_shaped(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    # The parameters of a Callable are a list.
    parts = hint if isinstance(hint, list) else get_args(hint)
    return any(_is_shaped(part) for part in parts)
