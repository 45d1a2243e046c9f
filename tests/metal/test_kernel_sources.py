"""The .metal files: found, documented, whole, and with the right address spaces."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

import mlx_ep
from mlx_ep.kernels import loader, metal, ops
from mlx_ep.kernels.records import RowFormat
from tests.support import host
from tests.support.host.lint import lint
from tests.support.projections import projection

FOLDER = Path(mlx_ep.__file__).parent.parent / "metal"
KERNELS = sorted(path.stem for path in FOLDER.glob("*.metal"))
each_kernel = pytest.mark.parametrize("name", KERNELS)


def test_all_are_there() -> None:
    assert tuple(KERNELS) == loader.KERNELS


@each_kernel
def test_twins_have_one_signature(name: str) -> None:
    kernel, twin = getattr(metal, name), getattr(ops, name)
    assert inspect.signature(kernel) == inspect.signature(twin)


@each_kernel
def test_file_says_what_it_does(name: str) -> None:
    text = loader.source(f"{name}.metal")
    assert text.startswith(f"// {name}: ")
    assert "// Grid: " in text
    assert f"METAL_FUNC void {name}(" in text


@each_kernel
def test_header_is_one_text(name: str) -> None:
    """No includes but Metal's own, every file once, lines where the files have them."""
    header = loader.header(name)
    assert re.findall(r'#include "', header) == []
    assert header.count('#line 1 "common.h"') == 1
    lines = loader.source(f"{name}.metal").splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#include"))
    after = header.split(f'#line {last + 2} "{name}.metal"\n')[1]
    assert after.splitlines()[: len(lines) - last - 1] == lines[last + 1 :]


def test_what_was_measured_with_other_kernels_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The digest is part of the key under which warm-ups are kept."""
    before, original = loader.sources_digest(), loader.source
    assert before == loader.sources_digest()
    monkeypatch.setattr(loader, "source", lambda name: original(name) + "// changed\n")
    loader.forget_kernels()
    assert loader.sources_digest() != before
    monkeypatch.undo()
    loader.forget_kernels()


def test_installed_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a wheel the files lie in the package."""
    (tmp_path / "mlx_ep" / "metal").mkdir(parents=True)
    (tmp_path / "mlx_ep" / "metal" / "common.h").write_text("installed")
    (tmp_path / "metal").mkdir()
    (tmp_path / "metal" / "pairs.h").write_text("checkout")
    monkeypatch.setattr(loader.resources, "files", lambda _: tmp_path / "mlx_ep")
    assert loader.source("common.h") == "installed"
    assert loader.source("pairs.h") == "checkout"


@pytest.mark.parametrize("packing", ["bfloat16", "affine4-64", "mxfp4"])
def test_lint_experts(host_kernels: list[host.Launch], packing: str) -> None:
    for num_tokens in (1, 2):
        gate = projection(packing, 2, 8, 128, bias=num_tokens == 1)
        ids = mx.array(np.zeros((num_tokens, 1), np.int32))
        x, gates = mx.zeros((num_tokens, 128)), mx.ones((num_tokens, 1))
        metal.expert_glu(x, ids, gate, gate)
        metal.expert_down(mx.zeros((num_tokens, 1, 128)), ids, gates, gate)
    for launch in host_kernels:
        assert lint(launch.name, launch.source) == ""


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_lint_movement(host_kernels: list[host.Launch], num_tokens: int) -> None:
    """Small arrays lie in the constant address space, larger ones in device memory."""
    ids = mx.array(np.zeros((num_tokens, 1), np.int32))
    one, x = mx.array([0], mx.int32), mx.zeros((num_tokens, 8), mx.bfloat16)
    for replicas in (1, 9):
        maps = [mx.zeros((1, replicas), mx.int32)] * 2
        metal.route_plan(ids, *maps, num_ranks=1, num_slots=1)
    metal.pack_rows(x, ids[:, 0], one)
    metal.unpack_sum(x, ids, mx.ones(ids.shape))
    local = x.astype(mx.float32)
    metal.unpack_sum(x, ids, mx.ones(ids.shape), local, dtype=mx.float32)
    for form in get_args(RowFormat):
        metal.dequantize_rows(metal.quantize_rows(x, form), form, 8, mx.float16)
    for launch in host_kernels:
        assert lint(launch.name, launch.source) == ""
