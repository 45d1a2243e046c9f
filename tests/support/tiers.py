"""What a test does where the tier that it requires is missing."""

from __future__ import annotations

import pytest

from tests.support.launchers import is_required, unavailable


def require(tier: str) -> None:
    """Skips where a tier is missing; fails where MLX_EP_REQUIRE names it."""
    reason = unavailable(tier)
    if reason is None:
        return
    if is_required(tier):
        pytest.fail(f"MLX_EP_REQUIRE names {tier}: {reason}", pytrace=False)
    pytest.skip(f"{tier}: {reason}")
