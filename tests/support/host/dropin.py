"""A stand-in for `mx.fast.metal_kernel` that executes on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest

from .execute import Launch, execute

_real_metal_kernel = mx.fast.metal_kernel


def traced(
    kernel: Callable[..., Any], inputs: Sequence[mx.array], call: dict[str, Any]
) -> tuple[str, str, list[int], list[int]]:
    """What MLX itself would hand to Metal for a call of one of its kernels.

    Tracing a function for export builds the operation without executing it, on every
    platform; the callback sees the arguments of the operation.

    Returns:
        The function's name, its source, the grid and the threadgroup.
    """
    seen: list[list[Any]] = []

    def note(record: dict[str, Any]) -> None:
        if record.get("type") == "primitive" and record.get("name") == "CustomKernel":
            seen.append(record["arguments"])

    mx.export_function(
        note, lambda *arrays: kernel(inputs=list(arrays), **call), *inputs
    )
    name, source, *sizes = seen[-1][:8]
    return name, source, sizes[:3], sizes[3:]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    *,
    seed: int = 0,
    timeout: int = 60,
    on_launch: Callable[[Launch], None] | None = None,
) -> Callable[..., list[mx.array]]:
    """As `mx.fast.metal_kernel`; a call executes at once and checks every access.

    Args:
        seed, timeout: as in `execute`.
        on_launch: called with every clean launch.
    """
    assert ensure_row_contiguous, "strided inputs are not modelled here"
    kernel = _real_metal_kernel(
        name=name,
        input_names=input_names,
        output_names=output_names,
        source=source,
        header=header,
        atomic_outputs=atomic_outputs,
    )

    def call(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        arguments = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
            "template": template,
            "init_value": init_value,
        }
        function, text, grid, threadgroup = traced(kernel, arrays, arguments)
        launch = execute(
            function,
            text,
            dict(zip(input_names, arrays, strict=True)),
            dict(
                zip(
                    output_names,
                    zip(output_shapes, output_dtypes, strict=True),
                    strict=True,
                )
            ),
            grid,
            threadgroup,
            init_value=init_value,
            seed=seed,
            timeout=timeout,
        )
        if verbose:
            print(text)
        if on_launch:
            on_launch(launch)
        return launch.outputs

    return call


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Launch]:
    """Replaces `mx.fast.metal_kernel` for the length of a test.

    Args:
        options: those of `metal_kernel`.

    Returns:
        A list to which every launch is added.
    """
    launches: list[Launch] = []

    def replacement(*args: Any, **kwargs: Any) -> Callable[..., list[mx.array]]:
        return metal_kernel(*args, **kwargs, on_launch=launches.append, **options)

    monkeypatch.setattr(mx.fast, "metal_kernel", replacement)
    return launches
