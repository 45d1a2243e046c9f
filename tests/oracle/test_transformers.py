"""mlx_ep on two ranks against transformers, on checkpoints that transformers wrote.

Run by `make test-oracle`, which installs PyTorch; where it is missing these tests fail.
"""

from __future__ import annotations

import pytest

from tests.support.oracle.checkpoints import ARCHITECTURES, NUM_TOKENS
from tests.support.oracle.compare import CANNOT, NOTES, TOLERANCE, Row, compare_all

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.requires("ranks"),
    pytest.mark.timeout(1800),
]

# The architectures of mlx-lm that transformers 5.23 does not have.
NOT_IN_TRANSFORMERS = {
    "Klear", "bailing_moe", "bailing_moe_linear", "deepseek", "deepseek_v41", "hunyuan",
    "joyai_llm_flash", "kimi_k2", "kimi_k3", "kimi_vl", "longcat_flash_ngram",
    "phixtral", "prism_hadamard_qwen35",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    rows = compare_all(tmp_path_factory.mktemp("oracle"))
    return {row.name: row for row in rows}


def test_logits_are_those_of_transformers(rows: dict[str, Row]) -> None:
    assert NUM_TOKENS >= 32
    compared = [row for row in rows.values() if not row.problem]
    wrong = [row for row in compared if not row.mlx_ep <= TOLERANCE]
    assert not wrong, wrong
    # Large enough that a wrong expert could not hide in the tolerance.
    assert all(1 < row.scale < 100 for row in compared)
    assert len(compared) == len(ARCHITECTURES) - len(NOT_IN_TRANSFORMERS) - len(CANNOT)


def test_what_differs_is_not_ours(rows: dict[str, Row]) -> None:
    """mlx_ep is as far from mlx-lm in one process as rounding takes it."""
    for row in rows.values():
        assert row.problem or row.between <= 2e-5, row


def test_no_architecture_is_left_out_silently(rows: dict[str, Row]) -> None:
    missing = {row.name for row in rows.values() if row.problem}
    assert missing == NOT_IN_TRANSFORMERS | set(CANNOT)
    for name in NOT_IN_TRANSFORMERS:
        assert "transformers has no model of type" in rows[name].problem
    assert set(NOTES) <= set(rows) - missing
