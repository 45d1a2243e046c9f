"""What goes wrong between this machine and the hub, in words for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class HubError(RuntimeError):
    """The hub, the way to it or what it sent is not in order; the text says what to do.

    Before weights are fetched `mlx_ep.loading.find_model` makes a ValueError of it, as
    every rank then can be told; later it ends the rank, and with it the others.
    """


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """What huggingface_hub and the disk raise in the body becomes a HubError.

    Args:
        repository: ``OWNER/NAME``, for the text.
    """
    try:
        yield
    except HubError as error:
        raise HubError(f"{repository}: {error}") from error
    except (HTTPError, OSError) as error:
        raise HubError(f"{repository}: {_reason(repository, error)}") from error


def offline_problem(what: str) -> str:
    """Why something that is not here cannot be had."""
    return (
        f"{what} not on this machine, and HF_HUB_OFFLINE says not to ask the hub. "
        "Unset it for one start, on every rank."
    )


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _reason(repository: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            "the repository is gated. Open "
            f"{constants.ENDPOINT}/{repository} in a browser, accept its terms, then "
            "let every rank have a token of that account (hf auth login on each host, "
            "or HF_TOKEN)."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no such repository at {constants.ENDPOINT}, or it is private. "
            "Check the name; for a private one every rank needs a token (hf auth login "
            "on each host, or HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision. Check --revision."
    if isinstance(error, LocalEntryNotFoundError) and isinstance(
        error.__cause__, OfflineModeIsEnabled
    ):
        return offline_problem("it is")
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return (
            f"{constants.ENDPOINT} could not be asked, and the model is not on this "
            f"machine: {first_line(error.__cause__)}."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            "the disk is full. What was fetched is kept: make room (hf cache rm), or "
            "set HF_HOME to a folder on a larger disk, and start again."
        )
    return f"{first_line(error)}."
