"""The import table and the list of host syncs, held by reading the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_ep"

# Which rooms of the package each room may import, floor by floor. A room is a module or
# a folder at the top of the package.
MAY_IMPORT = {
    # Records and alphabet.
    "types": set(),
    "config": {"types"},
    "metrics": {"types"},
    # Ranks, where experts are, the kernels.
    "comm": {"types"},
    "placement": set(),
    "kernels": set(),
    # The parts of a layer.
    "rows": {"types", "kernels", "placement"},
    "experts": {"types", "kernels", "metrics", "rows"},
    "exchange": {"types", "comm", "config", "metrics", "placement", "rows"},
    "moe": {
        "types", "comm", "config", "exchange", "experts", "metrics", "placement",
        "rows",
    },
    # Predicting and measuring what a layer takes.
    "cost": {"types", "comm", "config", "exchange", "metrics", "placement"},
    "tune": {
        "types", "comm", "exchange", "experts", "kernels", "metrics",
        "placement", "rows",
    },
    # Models and their weights.
    "models": {"types", "comm", "experts", "moe"},
    "loading": {
        "types", "comm", "config", "cost", "metrics", "models", "placement", "rows",
        "tune",
    },
    "api": {
        "comm", "config", "cost", "exchange", "experts", "loading", "metrics",
        "models", "moe", "placement", "rows", "tune",
    },
    "__init__": {
        "api", "comm", "config", "exchange", "moe", "placement", "rows", "types",
    },
    # What commands share.
    "data_parallel": {"comm", "types"},
    "measure": {
        "types", "comm", "cost", "experts", "kernels", "loading", "metrics", "rows",
        "tune",
    },
    "cli": {
        "types", "api", "comm", "config", "exchange", "loading", "placement", "rows",
        "tune",
    },
    # The commands.
    "generate": {"types", "api", "cli", "comm", "data_parallel", "loading", "metrics"},
    "chat": {"cli", "comm", "tune"},
    "cache_prompt": {"cli", "comm"},
    "launch": {"cli"},
    "__main__": {"cli"},
    "doctor": {
        "api", "cli", "comm", "config", "cost", "loading", "measure", "metrics", "rows",
        "tune",
    },
    "calibrate": {
        "cli", "comm", "cost", "loading", "measure", "rows", "simulate", "tune",
    },
    "perplexity": {"types", "cli", "comm"},
    "overlay": {"api", "cli", "comm", "config", "loading"},
    "server": {
        "types", "cli", "comm", "config", "cost", "data_parallel", "loading", "metrics",
        "models", "moe", "tune",
    },
    "plan": {
        "cli", "config", "cost", "loading", "metrics", "models", "placement",
        "simulate", "tune",
    },
    "simulate": {
        "types", "cli", "config", "cost", "exchange", "loading", "measure", "placement",
        "server",
    },
    "benchmark": {
        "types", "api", "cli", "comm", "config", "cost", "data_parallel", "exchange",
        "loading", "measure", "metrics", "models", "moe", "placement", "simulate",
        "tune",
    },
}  # fmt: skip
# The package's names and the list of its commands hold no concept of their own.
NO_ROOMS = {"__init__", "__main__"}
MOST_ROOMS = 30
MOST_FLOORS = 11


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


def _floor(part: str, above: tuple[str, ...] = ()) -> int:
    """1 for a room that imports no other; else one more than the highest it imports."""
    assert part not in above, f"a circle: {' -> '.join([*above, part])}"
    return 1 + max((_floor(p, (*above, part)) for p in MAY_IMPORT[part]), default=0)


def test_every_room_has_a_row() -> None:
    assert set(_parts()) == set(MAY_IMPORT)
    assert len(set(MAY_IMPORT) - NO_ROOMS) <= MOST_ROOMS


@pytest.mark.parametrize("part", _parts())
def test_import_table(part: str) -> None:
    """A room imports what its row says: nothing else, and no less."""
    used = set()
    for file in _files(part):
        imported = _imported_parts(file) - {part}
        extra = imported - MAY_IMPORT[part]
        assert not extra, f"{file.relative_to(PACKAGE)} may not import {sorted(extra)}"
        used |= imported
    if part != "__init__":  # which names what it gives by strings
        assert used == MAY_IMPORT[part], f"{part} does not use all of its row"


def test_floors() -> None:
    assert max(map(_floor, MAY_IMPORT)) <= MOST_FLOORS


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
    "to_host", "view_on_host",
}  # fmt: skip
_SYNC_METHODS = {"item", "tolist"}
_SYNC_WINDOW = 4  # lines above, within which the comment stands


def _waits_for_device(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    is_method = isinstance(node.func, ast.Attribute) and node.func.attr in _SYNC_METHODS
    return is_method or ast.unparse(node.func) in _SYNC_CALLS


def _has_arrays(file: Path) -> bool:
    """Whether a file imports MLX: one that does not computes on the host alone."""
    return re.search(r"^\s*import mlx\b", file.read_text(), re.MULTILINE) is not None


_WITH_ARRAYS = sorted(filter(_has_arrays, PACKAGE.rglob("*.py")))


@pytest.mark.parametrize(
    "file", _WITH_ARRAYS, ids=lambda f: str(f.relative_to(PACKAGE))
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


@pytest.mark.parametrize(
    "file", _WITH_ARRAYS, ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_numpy_reads_what_is_evaluated(file: Path) -> None:
    """`np.array` of a collective's result hides that a rank is gone."""
    if file == PACKAGE / "types.py":  # which has `to_host`
        return
    source = file.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) not in ("np.array", "np.asarray"):
            continue
        window = lines[max(0, node.lineno - 1 - _SYNC_WINDOW) : node.end_lineno]
        reasons = [line for line in window if "# sync:" in line or "# on host" in line]
        assert reasons and "# on host" in reasons[-1], (
            f"{file.name}:{node.lineno} must be to_host(...) of mlx_ep.types, or say "
            "'# on host' where it is no mx.array"
        )


def test_helpers_of_tests_are_in_one_place() -> None:
    """No test module is imported by another file, and nothing else holds helpers."""
    root = PACKAGE.parent
    tests = [f for f in (root / "tests").rglob("*.py") if "support" not in f.parts]
    kinds = ("__init__.py", "conftest.py")
    others = [f for f in tests if f.name not in kinds and f.name[:5] != "test_"]
    assert not others, f"they belong in tests/support: {others}"
    users = [
        *tests,
        *(f for d in ("benchmarks", "tools") for f in root.glob(f"{d}/*.py")),
    ]
    users += (root / "tests" / "support").rglob("*.py")
    for file in users:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                place = node.module.split(".")
                if place[0] == "tests" and place != ["tests"]:
                    assert place[1] == "support", f"{file} imports {node.module}"


MOST_LINES = 400


def _names(file: Path) -> list[str]:
    """Public classes and named types that a file defines: names in CapWords."""
    found = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        found += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in found if re.match("[A-Z][A-Za-z0-9]*[a-z]", name)]


def test_a_public_name_stands_once() -> None:
    places: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in _names(file):
            places.setdefault(name, []).append(str(file.relative_to(PACKAGE)))
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert not twice, "\n".join(f"{n}: {', '.join(f)}" for n, f in twice.items())


def test_files_are_short() -> None:
    lines = {
        str(file.relative_to(PACKAGE)): len(file.read_text().splitlines())
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    long = {file: count for file, count in lines.items() if count > 300}
    assert max(long.values(), default=0) <= MOST_LINES, (
        f"at most {MOST_LINES} lines; over 300: {long}"
    )
