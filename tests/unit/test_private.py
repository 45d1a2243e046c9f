"""What the tests keep between runs lies where no other user can put something."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.private import private_folder


def test_made_closed_and_taken_again(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "kept")
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "file").write_text("kept")
    assert (private_folder(folder) / "file").read_text() == "kept"


def test_open_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match=r"closed to others; found drwxr-xr-x"):
        private_folder(tmp_path)


def test_link_to_a_folder(tmp_path: Path) -> None:
    """Whoever made the link can point it elsewhere later."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError, match="found l"):
        private_folder(tmp_path / "link")


def test_folder_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = private_folder(tmp_path / "kept")
    owner = folder.stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match=f"user {owner + 1} .* of user {owner}"):
        private_folder(folder)
