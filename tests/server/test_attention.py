"""How `--attention auto` of the server chooses."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_ep.cost.profile import Profile, find_profile
from mlx_ep.cost.shape import ModelShape
from mlx_ep.loading import find_model, model_shape, read_config
from mlx_ep.server.attention import ServingAttention, choose_mode


def _shape() -> ModelShape:
    return model_shape(read_config(find_model("jargon-moe")))


def _choose(profile: Profile | None, **given: Any) -> ServingAttention:
    options: dict[str, Any] = {
        "num_ranks": 2, "sequences": 8, "memory": 10**12, "problems": {},
    }  # fmt: skip
    return choose_mode(_shape(), profile, **(options | given))


def test_one_rank() -> None:
    assert _choose(None, num_ranks=1).mode == "replicated"


def test_without_a_profile_memory_decides() -> None:
    shape = _shape()
    each = int(shape.cache_bytes(2048))
    weights = shape.held_bytes("ep-replicated", 2)
    assert _choose(None).mode == "replicated"
    few = _choose(None, memory=weights + 4 * each, problems={"tensor": "odd heads"})
    assert few.mode == "data"
    assert "replicated 4, data 8" in few.reason


@pytest.mark.parametrize("memory_of", [3, 10**6])
def test_the_most_tokens_per_second(memory_of: int) -> None:
    shape, profile = _shape(), find_profile("m3-ultra")
    memory = shape.num_bytes + memory_of * int(shape.cache_bytes(2048))
    choice = _choose(profile, memory=memory, sequences=64)
    speeds = {
        words[0]: float(words[1])
        for part in choice.reason.split(": ", 1)[1].split(", ")
        if (words := part.split())[0] in ("replicated", "tensor", "data")
    }
    assert set(speeds) == {"replicated", "tensor", "data"}
    assert speeds[choice.mode] == max(speeds.values())
    assert str(choice).startswith(f"attention: {choice.mode} (predicted for 64")


def test_what_is_not_possible_is_left_out_and_said() -> None:
    choice = _choose(find_profile("m3-ultra"), problems={"tensor": "odd heads"})
    assert choice.mode != "tensor"
    assert "not tensor: odd heads" in choice.reason
