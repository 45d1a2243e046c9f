"""On which stream the server's collectives run."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ep.comm import GroupComm, default_cpu_stream
from mlx_ep.comm.group import communication_stream
from mlx_ep.config import EPConfig, OverlapMode
from mlx_ep.server.__main__ import _in_one_stream


@pytest.mark.parametrize(
    ("overlap", "stream"),
    [
        ("none", default_cpu_stream),
        ("single", communication_stream),
        ("two", communication_stream),
    ],
)
def test_a_cpu_computes_and_talks_on_one_stream(
    overlap: OverlapMode, stream: object
) -> None:
    assert mx.default_device().type == mx.cpu
    comm = _in_one_stream(GroupComm(), EPConfig(overlap=overlap))
    assert isinstance(comm, GroupComm)
    assert comm._stream is stream
    with mx.stream(mx.new_thread_local_stream(mx.cpu)):
        assert mx.array_equal(comm.all_reduce(mx.arange(3)), mx.arange(3))
