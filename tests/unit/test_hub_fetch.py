"""From the hub into a model folder with holes, in one process, for one rank at a time.

The real ranks are in tests/ranks/test_hub.py. A little over 400 lines, because all
tests share the hub and the layouts that it serves.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ep.api import prepare
from mlx_ep.api.prepared import check_commits
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.loading import (
    Checkpoint,
    RankWeights,
    checkpoint_weights,
    find_model,
    hub_commit,
    load_bytes,
)
from mlx_ep.loading.hub import fetch as module
from mlx_ep.loading.hub.errors import HubError
from mlx_ep.loading.hub.fetch import DiskNeed, disk_problems
from mlx_ep.loading.hub.ranges import Span
from mlx_ep.loading.hub.retries import Retries
from mlx_ep.loading.hub.sparse import Journal
from mlx_ep.placement import Placement
from tests.support import tiny
from tests.support.hub_server import HubServer, Repository, locked_elsewhere, use_cache
from tests.support.waiting import LONG

LAYOUTS = {
    "stacked": {},
    "per-expert": {"layout": "per_expert", "shards": 3},
    "quantized": {
        "quantization": {"group_size": 32, "bits": 4, "mode": "affine"},
        "shards": 2,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: tiny.save_checkpoint(root / name, tiny.QWEN3_MOE, **options)
        for name, options in LAYOUTS.items()
    }


@pytest.fixture
def hub(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    """A hub, and an empty cache of huggingface_hub and of ours."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", "")  # undone at the end
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", "")
    use_cache(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    repositories = {f"me/{name}": Repository(path) for name, path in folders.items()}
    with HubServer(repositories) as hub:
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def _open(name: str, rank: int, num_ranks: int) -> RankWeights:
    path = find_model(f"me/{name}", download="ranges")
    return checkpoint_weights(path, rank, num_ranks)


def _fetch(weights: RankWeights) -> None:
    assert weights.fetch is not None
    weights.fetch.run(0, Retries(attempts=3, first_wait=0.01))


def _sent(hub: HubServer) -> int:
    """Bytes of weight files that were sent since the last time."""
    count = hub.bytes_of("")
    hub.forget()
    return count


def _header_bytes(folder: Path) -> int:
    files = folder.glob("*.safetensors")
    return sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)


def _assert_same(weights: RankWeights, local: RankWeights) -> None:
    model, expected = weights.build(None)[0], local.build(None)[0]
    ours = dict(tree_flatten(model.parameters()))
    theirs = dict(tree_flatten(expected.parameters()))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(
            np.array(mx.view(array, mx.uint8)),
            np.array(mx.view(theirs[name], mx.uint8)),
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_fetches_its_share(
    hub: HubServer, folders: dict[str, Path], name: str
) -> None:
    """Headers first, then what it will hold; and these are the right bytes."""
    weights = _open(name, 1, 3)
    assert _sent(hub) == _header_bytes(folders[name])
    assert weights.fetch is not None
    assert weights.fetch.missing_bytes <= 1.01 * weights.rank_bytes
    plan = load_bytes(Checkpoint.open(folders[name]), weights.placement, 1)
    need = weights.fetch.disk_need("host")
    assert need.shared_bytes == plan.dense_bytes
    assert plan.expert_bytes <= need.own_bytes
    _fetch(weights)
    assert _sent(hub) == weights.fetch.missing_bytes
    _assert_same(weights, checkpoint_weights(folders[name], 1, 3))
    _fetch(weights)
    assert _sent(hub) == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_are_fetched_too(
    hub: HubServer, folders: dict[str, Path], name: str
) -> None:
    """A rank with copies of 4 experts of others fetches those bytes, and no more."""
    contiguous = checkpoint_weights(folders[name], 1, 2)
    plain = load_bytes(Checkpoint.open(folders[name]), contiguous.placement, 1)
    num_experts = contiguous.placement.num_experts
    each = plain.expert_bytes / contiguous.placement.num_slots(1)
    config = EPConfig(replica_memory=f"{4.5 * each / 1e9:.12f}")
    path = find_model(f"me/{name}", download="ranges")
    weights = checkpoint_weights(path, 1, 2, config)
    placement = weights.placement
    assert placement.num_copies == 8 and placement.num_slots(1) == num_experts // 2 + 4
    _sent(hub)
    _fetch(weights)
    held = load_bytes(Checkpoint.open(folders[name]), placement, 1)
    assert held.expert_bytes == round(plain.expert_bytes + 4 * each)
    sent = _sent(hub)
    assert held.rank_bytes <= sent + _header_bytes(folders[name])
    assert sent <= 1.01 * held.rank_bytes
    _assert_same(weights, checkpoint_weights(folders[name], 1, 2, config))


def test_another_placement_fetches_what_is_missing(
    hub: HubServer, folders: dict[str, Path]
) -> None:
    total = sum(f.stat().st_size for f in folders["stacked"].glob("*.safetensors"))
    sent = 0
    for rank, num_ranks in ((0, 3), (1, 2), (0, 1)):
        weights = _open("stacked", rank, num_ranks)
        _fetch(weights)
        sent += _sent(hub)
        _assert_same(weights, checkpoint_weights(folders["stacked"], rank, num_ranks))
    assert sent == total  # every byte once


def test_a_commit_needs_no_request(hub: HubServer) -> None:
    """A branch costs one question, for its commit; and all is there already."""
    _fetch(_open("stacked", 0, 2))
    hub.forget()
    path = find_model("me/stacked", download="ranges")
    assert [request.path for request in hub.requests] == [
        "/api/models/me/stacked/revision/main"
    ]
    hub.forget()
    commit = hub.repositories["me/stacked"].commit
    assert find_model("me/stacked", commit, download="ranges") == path
    assert hub.requests == []


def test_the_next_start_is_offline(
    hub: HubServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fetch(_open("per-expert", 0, 2))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.forget()
    again = _open("per-expert", 0, 2)
    _fetch(again)
    _assert_same(again, checkpoint_weights(folders["per-expert"], 0, 2))
    assert hub.requests == [] and hub.other_requests == []
    with pytest.raises(ValueError, match=r"weights of rank 1 are not.*HF_HUB_OFFLINE"):
        _open("per-expert", 1, 2)
    with pytest.raises(ValueError, match=r"it is not on this machine, and HF_HUB_OFF"):
        _open("stacked", 0, 2)


def test_what_another_process_fetches_is_left_to_it(
    hub: HubServer, folders: dict[str, Path]
) -> None:
    weights = _open("stacked", 0, 2)
    assert weights.fetch is not None
    (file,) = weights.fetch.wanted
    blob = weights.fetch.folder.blob(file)
    hub.forget()
    with ThreadPoolExecutor(1) as pool:
        with locked_elsewhere(blob, (0, file.size)):
            fetching = pool.submit(_fetch, weights)
            time.sleep(0.5)
            assert not fetching.done()
            # Now it has all of it.
            with blob.open("r+b") as stream:
                stream.write((folders["stacked"] / file.name).read_bytes())
            Journal(blob).append(Span(0, file.size))
        fetching.result(timeout=LONG)
    assert _sent(hub) == 0
    _assert_same(weights, checkpoint_weights(folders["stacked"], 0, 2))


def test_a_hole_is_never_read(hub: HubServer) -> None:
    """Neither by us, in stacks, nor by MLX, in tensors of single experts."""
    for name in ("stacked", "per-expert"):
        with pytest.raises(RuntimeError, match=r"were never fetched"):
            _open(name, 0, 2).build(None)


def test_a_start_after_an_error_goes_on(
    hub: HubServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 4096)
    weights = _open("stacked", 0, 2)
    hub.forget()
    assert weights.fetch is not None
    needed = weights.fetch.missing_bytes
    hub.faults.after_bytes = needed // 2
    hub.faults.answers = [(503, None)] * 99
    with pytest.raises(
        HubError, match=r"me/stacked: the server answered 503; given up"
    ):
        weights.fetch.run(0, Retries(attempts=1))
    hub.faults.answers = []
    again = _open("stacked", 0, 2)
    assert again.fetch is not None
    # What eight connections were at when one of them failed is all that is lost.
    slack = 8 * 4096
    assert needed // 2 - slack <= again.fetch.missing_bytes <= needed // 2 + slack
    _fetch(again)
    _assert_same(again, checkpoint_weights(folders["stacked"], 0, 2))
    assert needed > 8 * slack
    assert needed <= _sent(hub) <= needed + slack


def test_a_whole_file_with_a_wrong_hash_is_not_used(
    hub: HubServer, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The storage host has other bytes than the hub says."""
    changed = shutil.copytree(folders["stacked"], tmp_path / "changed")
    repository = Repository(changed)
    hub.repositories["me/changed"] = repository
    hashes = {name: repository.etag(name) for name in repository.names()}
    etag = hashes["model.safetensors"]
    repository.etag = hashes.__getitem__  # type: ignore[method-assign]
    data = (changed / "model.safetensors").read_bytes()
    (changed / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    weights = _open("changed", 0, 1)
    with pytest.raises(HubError, match=rf"their hash is .* the hub says {etag}"):
        _fetch(weights)
    (changed / "model.safetensors").write_bytes(data)
    weights = _open("changed", 0, 1)
    assert weights.fetch is not None
    assert weights.fetch.missing_bytes == weights.rank_bytes
    _fetch(weights)


def test_files_that_did_not_change_are_not_fetched_again(
    hub: HubServer, folders: dict[str, Path]
) -> None:
    """A new commit, which changes config.json alone."""
    _fetch(_open("stacked", 0, 2))
    config = folders["stacked"] / "config.json"
    text = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(text) | {"note": "new"}))
        hub.repositories["me/stacked"] = Repository(folders["stacked"])
        hub.forget()
        weights = _open("stacked", 0, 2)
        _fetch(weights)
        assert _sent(hub) == 0
        assert weights.fetch is not None
        path = weights.fetch.folder.path
        assert json.loads((path / "config.json").read_text())["note"] == "new"
    finally:
        config.write_text(text)


def test_full_download_and_its_cache(hub: HubServer, folders: dict[str, Path]) -> None:
    """All files; and where huggingface_hub has them, ranges ask for nothing."""
    path = find_model("me/per-expert", download="full")
    total = sum(f.stat().st_size for f in folders["per-expert"].glob("*.safetensors"))
    assert _sent(hub) == total
    assert find_model("me/per-expert", download="ranges") == path
    weights = checkpoint_weights(path, 0, 2)
    assert weights.fetch is None
    weights.build(None)
    assert _sent(hub) == 0


def test_files_that_huggingface_hub_has_are_used(
    hub: HubServer, folders: dict[str, Path]
) -> None:
    """One of three weight files is there, whole."""
    path = find_model("me/per-expert", with_weights=False)
    name = "model-00002-of-00003.safetensors"
    shutil.copy(folders["per-expert"] / name, path / name)
    hub.forget()
    weights = _open("per-expert", 0, 2)
    _fetch(weights)
    sent = {name for _, name in hub.sent if name.endswith(".safetensors")}
    assert sent == {f"me/per-expert/model-0000{i}-of-00003.safetensors" for i in (1, 3)}
    _assert_same(weights, checkpoint_weights(folders["per-expert"], 0, 2))


def test_ranks_must_have_one_commit(hub: HubServer, tmp_path: Path) -> None:
    """The model may change on the hub between the questions of two ranks."""
    commit = hub.repositories["me/stacked"].commit
    assert hub_commit(find_model("me/stacked", download="ranges")) == commit
    assert hub_commit(find_model("me/stacked", download="full")) == commit
    assert hub_commit(tmp_path) == ""
    check_commits(["", commit, "", commit])
    with pytest.raises(ValueError, match=rf"rank 1 has {commit}, rank 2 has other"):
        check_commits(["", commit, "other", commit])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_in_a_terminal(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a line of its own for each rank, and a line where there is no terminal."""
    for rank, stream in ((1, _Terminal()), (0, io.StringIO())):
        weights = _open("stacked", rank, 2)
        assert weights.fetch is not None
        monkeypatch.setattr("sys.stderr", stream)
        with caplog.at_level("INFO", "mlx_ep"):
            weights.fetch.run(rank)
        printed = stream.getvalue()
        if stream.isatty():
            assert f"rank {rank} fetching:" in printed
            assert printed.startswith("\n") and "/628k" in printed
    # Behind it comes how long it took, if that was a second.
    line = caplog.records[0].getMessage()
    assert line.startswith("rank 0: fetching ") and line.endswith("of me/stacked")
    assert not printed


def test_the_disk_must_have_room() -> None:
    gigabyte = 10**9
    needs = [
        DiskNeed("a", 1, 2 * gigabyte, 3 * gigabyte, 7 * gigabyte),
        DiskNeed("a", 1, 2 * gigabyte, 3 * gigabyte, 7 * gigabyte),
        DiskNeed("a", 2, 2 * gigabyte, 3 * gigabyte, 5 * gigabyte),
        DiskNeed("b", 1, 2 * gigabyte, 3 * gigabyte, 5 * gigabyte),
    ]
    problems = disk_problems(needs)
    # Ranks 0 and 1 share a disk: their dense tensors are fetched once.
    assert "8.00 GB are to be fetched, 7.00 GB are free" in problems[0]
    assert problems[1] and problems[2:] == ["", ""]


def test_a_full_disk_is_refused_before_a_weight(
    hub: HubServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folders["stacked"] / "model.safetensors").stat().st_size
    usage = shutil.disk_usage("/")._replace(free=size // 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    comm = GroupComm(mx.distributed.init())
    with pytest.raises(ValueError, match=r"disk of rank 0 .* is too full: .* HF_HOME"):
        prepare("me/stacked", comm, EPConfig())
    assert _sent(hub) == _header_bytes(folders["stacked"])


def test_a_repository_without_weights(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    hub.repositories["me/empty"] = Repository(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"me/empty: it has no model\*\.safetensors"):
        find_model("me/empty", download="ranges")


def test_a_file_that_is_no_safetensors(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\xff" * 100)
    hub.repositories["me/bad"] = Repository(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors"):
        find_model("me/bad", download="ranges")


def test_spans_are_those_of_the_placement(folders: dict[str, Path]) -> None:
    """Every byte of every tensor is wanted by some rank, experts by one rank only."""
    for folder in folders.values():
        checkpoint = Checkpoint.open(folder)
        placement = Placement(((7, 2, 3, 0), (), (9, 8, 1), (4, 5, 6)))
        spans = [module.wanted_spans(checkpoint, placement, r) for r in range(4)]
        for file in spans[0][0]:
            dense = {tuple(s[0][file]) for s in spans}
            assert len(dense) == 1
            parts = [s for rank in spans for s in rank[1][file]] + [*dense.pop()]
            end = file.stat().st_size
            ordered = sorted(parts)
            assert ordered[-1].stop == end
            assert all(a.stop == b.start for a, b in pairwise(ordered))
