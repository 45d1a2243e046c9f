"""Where a model's files come from: the embedded model, a folder, or the hub."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download

from mlx_ep.loading.hub.errors import HubError, explained
from mlx_ep.loading.hub.repository import SMALL_FILES, WEIGHT_FILES, open_repository

# The name of the model inside the package, the default of every command.
EMBEDDED_MODEL = "jargon-moe"

# What makes a folder an overlay (`mlx_ep.overlay`), and says of which model.
OVERLAY_FILE = "mlx_ep.json"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(
    path_or_repo: str,
    revision: str | None = None,
    with_weights: bool = True,
    download: str = "full",
) -> Path:
    """The folder of a model; a hub repository is downloaded first.

    Args:
        path_or_repo: ``jargon-moe`` (inside the package), a folder, a config.json, or
            the name of a hub repository such as ``mlx-community/NAME``. An overlay's
            folder stands for its model.
        revision: a branch, tag or commit of a repository.
        with_weights: whether the weight files are wanted.
        download: of a repository's weight files. ``full``: all of them. ``ranges``:
            their headers; the files have holes, which `checkpoint_weights` fills as
            far as the rank needs it. Where huggingface_hub's cache has the files
            already, they are used.

    Raises:
        ValueError: there is no such folder and no such repository, or it cannot be
            reached.
    """
    if path_or_repo == EMBEDDED_MODEL:
        return Path(str(files("mlx_ep") / "embedded" / EMBEDDED_MODEL))
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return _model_of_overlay(path) if (path / OVERLAY_FILE).is_file() else path
    if path.name == "config.json" and path.is_file():
        return path.parent
    if path.exists() or not _REPOSITORY.fullmatch(path_or_repo):
        raise ValueError(
            f"--model must be a model folder, a hub repository (OWNER/NAME) or "
            f"{EMBEDDED_MODEL}; there is no folder {path_or_repo!r}."
        )
    try:
        with explained(path_or_repo):
            if with_weights and download == "ranges":
                return open_repository(path_or_repo, revision)
            patterns = [*SMALL_FILES, *([WEIGHT_FILES] if with_weights else [])]
            return Path(
                snapshot_download(
                    path_or_repo, revision=revision, allow_patterns=patterns
                )
            )
    except HubError as error:
        raise ValueError(
            f"--model {path_or_repo!r} is not a folder here, and as a hub repository "
            f"it could not be fetched: {error}"
        ) from error


def _model_of_overlay(folder: Path) -> Path:
    """Raises:
    ValueError: the overlay is not in order, or its model is gone.
    """
    try:
        source = Path(json.loads((folder / OVERLAY_FILE).read_text())["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not an overlay of this version of mlx_ep ({error}). Make it "
            "again with mlx_ep.overlay."
        ) from None
    if not source.is_dir():
        raise ValueError(
            f"The overlay {folder} is of a model that is no longer at {source}. Make "
            "it again with mlx_ep.overlay."
        )
    return source


def hub_commit(model_path: Path) -> str:
    """The commit of a model folder that came from the hub, or ""."""
    return model_path.name if _COMMIT.fullmatch(model_path.name) else ""


def has_tokenizer(model_path: Path) -> bool:
    """Whether a model folder brings a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "tiktoken.model")
    return any((model_path / name).exists() for name in names)
