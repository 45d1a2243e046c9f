"""Folders that later runs of the tests read again, closed to other users."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_folder(path: Path) -> Path:
    """Makes a folder that only this user can enter, or takes it where it is one.

    What is kept there gets executed or believed later, so a folder that another user
    made at the same path must not be taken for ours.

    Raises:
        PermissionError: it is a link, no folder, another user's, or open to others.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or found.st_mode & 0o077:
        raise PermissionError(
            f"{path} must be a folder of user {os.getuid()} that is closed to others; "
            f"found {stat.filemode(found.st_mode)} of user {found.st_uid}: remove it, "
            "or set TMPDIR to another folder."
        )
    return path


def user_folder(name: str) -> Path:
    """This user's private folder of a name in the system's temporary folder."""
    return private_folder(Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}")
