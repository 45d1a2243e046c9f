"""The checks of shapes that the tests run with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beartype
import mlx.core as mx
import pytest
from jaxtyping import Float, TypeCheckError

from tests.support import shape_checks

calls: list[str] = []


def check(function: Any) -> Any:
    return shape_checks._checked(typechecker=beartype.beartype)(function)


@check
def paired(x: Float[mx.array, "T D"], y: Float[mx.array, " T"], k: int = 0) -> Any:
    calls.append("paired")
    return x


@check
def shortened(x: Float[mx.array, "T D"], by: int) -> Float[mx.array, "T D"]:
    return x[by:]


@check
def named(name: str) -> int:
    return len(name) if name else None  # type: ignore[return-value]


def test_other_shapes_dtypes_and_types_are_checked_again() -> None:
    x, y = mx.zeros((2, 3)), mx.zeros(2)
    calls.clear()
    for _ in range(3):
        assert paired(x, y) is x
    assert calls == ["paired"] * 3
    wrong: list[tuple[Any, ...]] = [
        (x, mx.zeros(3)),
        (x, mx.zeros(2, mx.int32)),
        (x, y, "k"),
        (None, y),
    ]
    for args in wrong:
        for _ in range(2):  # what was wrong is not taken for right
            with pytest.raises(TypeCheckError):
                paired(*args)
    assert len(calls) == 3
    assert paired(x, y, k=1) is x


def test_a_result_is_checked_where_its_shape_is_new() -> None:
    x = mx.zeros((4, 2))
    assert shortened(x, 0).shape == shortened(x, 0).shape == (4, 2)
    for _ in range(2):  # the same kinds of arguments as before
        with pytest.raises(TypeCheckError):
            shortened(x, 1)


def test_functions_without_arrays_are_checked_too() -> None:
    assert named("abc") == 3
    for argument in ("", 3):
        with pytest.raises(beartype.roar.BeartypeCallHintViolation):
            named(argument)


def test_a_function_in_a_function_is_checked_with_its_own_values() -> None:
    def make(offset: float) -> Callable[..., Any]:
        @check
        def add(x: Float[mx.array, "T D"]) -> Float[mx.array, "T D"]:
            return x + offset

        return add  # type: ignore[no-any-return]

    x = mx.zeros((1, 1))
    assert [make(offset)(x).item() for offset in (1.0, 2.0)] == [1.0, 2.0]
    with pytest.raises(TypeCheckError):
        make(3.0)(mx.zeros(1))


def test_errors_of_a_function_are_its_own() -> None:
    @check
    def fails(x: Float[mx.array, " T"]) -> None:
        raise KeyError("own")

    for _ in range(2):
        with pytest.raises(KeyError, match="own"):
            fails(mx.zeros(1))
    assert not shape_checks._pending.calls


def test_checkers_are_made_when_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shape_checks, "_unmade", [])
    made: list[str] = []

    def typechecker(function: Any) -> Any:
        made.append(function.__name__)
        return function

    decorate = shape_checks._checked(typechecker=typechecker)
    double, halve = decorate(_double), decorate(_halve)
    assert made == []
    assert double(2) == double(2) == 4
    assert made == ["_double"]
    shape_checks.make_all()
    assert sorted(made) == ["_double", "_halve"]
    assert halve(4) == 2
    assert sorted(made) == ["_double", "_halve"]


def _double(x: int) -> int:
    return 2 * x


def _halve(x: int) -> int:
    return x // 2
