"""What is shipped, and what the README promises."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_holds_metal_sources_and_the_embedded_model(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("metal", "mlx_ep/embedded/jargon-moe", "mlx_ep/cost/profiles"):
        for file in (ROOT / folder).iterdir():
            shipped = f"{folder.removeprefix('mlx_ep/')}/{file.name}"
            assert f"mlx_ep/{shipped}" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "bench"))]


def test_embedded_model_is_small() -> None:
    folder = ROOT / "mlx_ep" / "embedded" / "jargon-moe"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8_000_000


@pytest.mark.parametrize("number", [0])
def test_readme_code_runs(number: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    done = subprocess.run(
        [sys.executable, "-c", blocks[number]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pairs computed" in done.stdout


def test_documents_link_to_files_that_exist() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
