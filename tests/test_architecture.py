"""The import table and the list of host syncs, held by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_ep"

# Which parts of the package each part may import. A part is a module or a folder.
MAY_IMPORT = {
    "types": set(),
    "metrics": set(),
    "config": set(),
    "backend": set(),
    "kernels": {"types"},
    "comm": {"types"},
    "router": {"types"},
    "placement": {"types"},
    "dispatch": {"types", "placement", "kernels"},
    "combine": {"types", "kernels"},
    "movement": {"types", "backend", "combine", "dispatch", "kernels", "placement"},
    "experts": {"types", "kernels", "combine", "metrics", "movement"},
    "exchange": {
        "types", "comm", "config", "dispatch", "combine", "placement", "metrics",
        "movement",
    },
    "runners": {"types", "backend", "kernels", "experts", "metrics", "movement"},
    "policy": {
        "types", "backend", "config", "comm", "exchange", "kernels", "metrics",
        "movement", "placement", "runners",
    },
    "moe": {
        "types", "comm", "config", "dispatch", "exchange", "experts", "metrics",
        "placement", "router", "runners",
    },
    "models": {"comm", "types", "router", "moe", "runners"},
    "loading": {
        "types", "config", "metrics", "placement", "models", "policy",
    },
    # How the dense part runs: what ranks know and decide, for api.
    "attention": {"comm", "config", "loading", "models", "policy"},
    "api": {
        "attention",
        "types",
        "comm",
        "config",
        "exchange",
        "loading",
        "metrics",
        "models",
        "moe",
        "placement",
        "policy",
    },
    # What commands share, and the commands, which nothing imports.
    "cli": {"api", "comm", "config", "exchange", "loading"},
    "sampling": {"cli", "comm"},
    "data_parallel": {"comm", "sampling", "types"},
    "prompt_tokens": set(),
    "prompts_file": {"data_parallel", "prompt_tokens"},
    "draft": {"comm", "loading"},
    "overlay_model": {"api", "cli", "comm", "config", "loading"},
    "overlay": {"cli", "comm", "config", "loading", "overlay_model"},
    "perplexity": {"cli", "comm"},
    "prompt_cache": {"comm", "loading"},
    "reuse": {"cli", "comm", "draft", "prompt_cache"},
    "generate": {
        "cli", "comm", "config", "data_parallel", "loading", "metrics",
        "prompt_tokens", "prompts_file", "reuse", "sampling",
    },
    "plan": {
        "cli", "config", "loading", "metrics", "models", "placement", "policy",
    },
    "calibrate": {
        "benchmark", "cli", "comm", "loading", "policy", "runners",
    },
    "checks": {"comm", "kernels", "policy", "runners"},
    "doctor": {"checks", "cli", "comm", "policy", "runners"},
    "chat": {"api", "cli", "comm", "sampling", "generate"},
    "benchmark": {
        "api", "cli", "comm", "config", "exchange", "loading", "metrics", "models",
        "moe", "placement", "policy", "runners", "data_parallel", "types",
    },
    "__init__": {
        "api", "comm", "config", "dispatch", "exchange", "moe", "placement", "router",
        "types",
    },
}  # fmt: skip


def _parts() -> list[str]:
    names = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    return sorted(names)


def _files(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def _imported_parts(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            module = node.module or ""
            if module == "mlx_ep":
                found.update(alias.name for alias in node.names)
            elif module.startswith("mlx_ep."):
                found.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mlx_ep."):
                    found.add(alias.name.split(".")[1])
    return found


def test_every_part_has_a_row() -> None:
    assert set(_parts()) <= set(MAY_IMPORT)


@pytest.mark.parametrize("part", _parts())
def test_import_table(part: str) -> None:
    for file in _files(part):
        extra = _imported_parts(file) - MAY_IMPORT[part] - {part}
        assert not extra, f"{file.relative_to(PACKAGE)} may not import {sorted(extra)}"


def test_import_table_has_no_cycle() -> None:
    remaining = dict(MAY_IMPORT)
    while remaining:
        leaves = [
            part for part, needs in remaining.items() if not needs & set(remaining)
        ]
        assert leaves, f"cycle among {sorted(remaining)}"
        for part in leaves:
            del remaining[part]


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, mlx_ep; print([m for m in sys.modules if m.startswith('mlx')])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "['mlx_ep']"


# Reading an array's value makes the host wait for the device. Each such line says why,
# or says that the value is on the host already.
_SYNC_CALLS = {
    "mx.eval", "mx.synchronize", "np.array", "np.asarray", "memoryview",
}  # fmt: skip
_SYNC_METHODS = {"item", "tolist"}
_SYNC_WINDOW = 4  # lines above, within which the comment stands


def _waits_for_device(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    is_method = isinstance(node.func, ast.Attribute) and node.func.attr in _SYNC_METHODS
    return is_method or ast.unparse(node.func) in _SYNC_CALLS


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_host_syncs_are_marked(file: Path) -> None:
    source = file.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not _waits_for_device(node):
            continue
        window = lines[max(0, node.lineno - 1 - _SYNC_WINDOW) : node.end_lineno]
        assert any("# sync:" in line or "# on host" in line for line in window), (
            f"{file.name}:{node.lineno} waits for the device without a '# sync:' "
            f"comment that says why: {lines[node.lineno - 1].strip()}"
        )
