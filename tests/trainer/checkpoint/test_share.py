"""A rank's files: of a limited size, several per group, written by threads, with pieces beyond the limit cut."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save import share
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.share import plan_files
from trainer.checkpoint.save.store import CheckpointStore

BOUND = 100


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "FILE_BYTES", BOUND)


def whole(key: str, group: Group, tensor: torch.Tensor) -> Piece:
    return Piece(key, group, tensor, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape))


def odd_pieces() -> tuple[list[Piece], dict[str, torch.Tensor]]:
    """Pieces around the limit in every dimension, and the whole tensors that they make."""
    torch.manual_seed(0)
    full = {
        "rows": torch.randn(37, 5),
        "wide": torch.randn(1, 3, 41),  # one row is larger than a file
        "turned": torch.randn(12, 7).t(),
        "scalar": torch.tensor(3.0),
        "half": torch.randn(60).half(),
        "flat": torch.randn(11, 9),
        "exact": torch.randn(25),
        "double": torch.randn(3, dtype=torch.float64),
    }
    pieces = [whole(key, "model", tensor) for key, tensor in full.items() if key != "flat"]
    flat = full["flat"].view(-1)
    pieces += [Piece("flat", "model", flat[a:b], (11, 9), (), (), start=a) for a, b in pairwise((0, 1, 50, 99))]
    full["rows.m"] = torch.randn(37, 5)
    pieces += [
        Piece("rows.m", "optim", full["rows.m"][a:b], (37, 5), (a, 0), (b - a, 5)) for a, b in pairwise((0, 20, 37))
    ]
    return pieces, full


@pytest.mark.parametrize("threads", [1, 3])
def test_files_are_bounded_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(share, "WRITING_THREADS", threads)
    pieces, full = odd_pieces()
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, pieces, RunState())
    assert [result.error for result in store.wait()] == [None]
    checkpoint = Checkpoint(store.shelf.path(1))
    checkpoint.verify()
    files = checkpoint.manifest.files
    assert all(file.size - file.data <= BOUND for file in files)
    assert sum(file.path.startswith("model/") for file in files) > 10
    assert "optim/rank-00000-001.safetensors" in {file.path for file in files}
    for key, tensor in full.items():
        assert torch.equal(checkpoint.read(key), tensor), key
    for file in files:
        for label, part in load_file(checkpoint.path / file.path).items():
            key, _, place = label.partition("@")
            if place.startswith("+"):
                expected = full[key].reshape(-1)[int(place) : int(place) + part.numel()]
            else:
                at = [int(o) for o in place.split(",")] if place else []
                expected = full[key][tuple(slice(o, o + n) for o, n in zip(at, part.shape, strict=True))]
            assert torch.equal(part, expected), label


def test_replicas_share_the_parts_of_a_large_piece() -> None:
    tensor = torch.zeros(1000)
    shares = [
        [
            p.offsets
            for f in plan_files([Piece("a", "model", tensor, (1000,), (0,), (1000,), r, 2)], r)
            for p in f.layout.pieces
        ]
        for r in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == [(n,) for n in range(0, 1000, 25)]
    assert min(len(part) for part in shares) > 10


def test_an_error_in_one_thread_fails_the_save_after_all_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread writes any more when the partial folder is removed."""
    monkeypatch.setattr(share, "WRITING_THREADS", 3)
    pieces, _ = odd_pieces()
    store = CheckpointStore(tmp_path / "checkpoints")
    after_removal: list[str] = []

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name == "unlink":
            after_removal.append("unlink")
        elif after_removal and operation.name in ("create", "write", "fsync"):
            after_removal.append(operation.name)
        if operation.name == "write" and "model/rank-00000-001" in operation.path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    disk.observer = observe
    try:
        store.save(1, pieces, RunState())
        (result,) = store.wait()
    finally:
        disk.observer = None
    assert "No space left" in str(result.error)
    assert set(after_removal) == {"unlink"}
    assert os.listdir(store.root) == []


def test_files_are_written_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files meet in the middle of being written, which a single thread could not do."""
    monkeypatch.setattr(share, "WRITING_THREADS", 3)
    meeting = threading.Barrier(3, timeout=20)
    write_file = share.write_file

    def meet(*arguments: object) -> str:
        meeting.wait()
        return write_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(share, "write_file", meet)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, [whole(f"a{i}", "model", torch.ones(25)) for i in range(3)], RunState())
    assert [result.error for result in store.wait()] == [None]
    assert len(Checkpoint(store.shelf.path(1)).manifest.files) == 3
