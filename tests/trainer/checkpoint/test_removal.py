"""Old checkpoints are deleted beside training and saving: a slow delete holds up neither, and nothing is left of it."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_store import halves, pair, save, some

from configs.schema.checkpoint import KeepSection
from tests.distributed import run_ranks, tiny, train_here
from trainer.checkpoint.format import disk
from trainer.checkpoint.keep import removal as removal_module
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

KEEP_ONE = KeepSection(last=1, best=False)


class SlowDisk:
    """Unlinking the second file of what is deleted waits for `gate`: a delete that takes as long as a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.half_done = threading.Event(), threading.Event()
        self._first = True
        self._unlink = disk.unlink
        monkeypatch.setattr(disk, "unlink", self.unlink)

    def unlink(self, path: str) -> None:
        if ".deleting-" in path:
            if not self._first:
                self.half_done.set()
                assert self.gate.wait(60)
            self._first = False
        self._unlink(path)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk_that_waits = SlowDisk(monkeypatch)
    yield disk_that_waits
    disk_that_waits.gate.set()


def deleting(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if ".deleting-" in name)


def test_a_slow_delete_holds_up_neither_training_nor_the_next_save(tmp_path: Path, slow: SlowDisk) -> None:
    """A delete that takes 3 s and more. Files of what goes are linked on from save to save."""
    said: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=KEEP_ONE, say=said.append)
    first = save(store, 1)
    began = time.monotonic()
    for step in (2, 3, 4):
        result = save(store, step)
        assert result.ok
        assert result.stall_s < 1.0
        assert result.bytes_written < first.bytes_written, "the frozen tensor is linked"
        assert store.shelf.steps() == [step]
    assert time.monotonic() - began < 3.0
    assert deleting(store.root) == [f"step-0000000{step}.deleting-000" for step in (1, 2, 3)]
    threading.Timer(3.0, slow.gate.set).start()
    store.close()
    assert time.monotonic() - began > 3.0
    assert said == ["old checkpoints are being deleted; what is cut short now goes with the next start"]
    assert os.listdir(store.root) == ["step-00000004"]
    Checkpoint(store.shelf.path(4)).verify()


def test_one_is_deleted_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    unlink = disk.unlink

    def slowly(path: str) -> None:
        seen.append(Path(path).parents[1].name if Path(path).suffix == ".safetensors" else Path(path).parent.name)
        time.sleep(0.01)
        unlink(path)

    monkeypatch.setattr(disk, "unlink", slowly)
    store = CheckpointStore(tmp_path / "checkpoints", keep=KEEP_ONE)
    for step in (1, 2, 3, 4, 5):
        assert save(store, step).ok
    store.close()
    assert seen == sorted(seen), "none is begun before the one before it is gone"
    assert len(set(seen)) == 4


def test_killed_in_the_middle_of_a_delete_and_of_the_save_beside_it(tmp_path: Path, slow: SlowDisk) -> None:
    """The folder as a crash would leave it, at every operation of a save that goes on beside a delete."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=KEEP_ONE)
    assert save(store, 1).ok
    assert save(store, 2).ok
    assert slow.half_done.wait(10)
    left: list[Path] = []

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        copy = tmp_path / f"crash-{len(left)}"
        subprocess.run(["cp", "-a", str(store.root), str(copy)], check=True)
        left.append(copy)
        yield

    disk.observer = observe
    try:
        result = save(store, 3)
    finally:
        disk.observer = None
    assert result.ok
    slow.gate.set()
    assert len(left) > 20
    found = []
    for root in left:
        doomed = root / "step-00000001.deleting-000"
        assert [(doomed / group).exists() for group in ("frozen", "model", "optim")] == [False, True, True]
        shelf = Shelf(root, KEEP_ONE, print)
        assert "step-00000001.deleting-000" in shelf.clean()
        newest = shelf.newest_good()
        assert newest is not None
        newest.verify()
        found.append(newest.step)
        assert all(".deleting-" not in name and ".partial-" not in name for name in os.listdir(root))
    assert found == sorted(found)
    assert set(found) == {2, 3}


def test_what_cannot_be_deleted_is_said_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = disk.unlink

    def refuse(path: str) -> None:
        if "step-00000001.deleting" in path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        unlink(path)

    monkeypatch.setattr(disk, "unlink", refuse)
    said: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=KEEP_ONE, say=said.append)
    for step in (1, 2, 3):
        assert save(store, step).ok
    store.close()
    assert sorted(os.listdir(store.root)) == ["step-00000001.deleting-000", "step-00000003"]
    (line,) = said
    assert line.startswith(f"{store.root}/step-00000001.deleting-000 stays until the next start: ")
    assert "Permission denied" in line
    monkeypatch.setattr(disk, "unlink", unlink)
    assert store.shelf.clean() == ["step-00000001.deleting-000"]


def test_without_room_for_both_a_save_waits_for_the_delete(
    tmp_path: Path, slow: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run asked the disk for counts no checkpoint that is being deleted: a save must not fill the disk."""
    free_bytes = 10**9
    usage = SimpleNamespace(disk_usage=lambda root: SimpleNamespace(free=free_bytes))
    monkeypatch.setattr(removal_module, "shutil", usage)
    store = CheckpointStore(tmp_path / "checkpoints", keep=KEEP_ONE)
    for step in (1, 2, 3):
        assert save(store, step).ok
    size = sum(path.stat().st_size for path in store.shelf.path(3).rglob("*.safetensors"))
    free_bytes = size
    assert save(store, 4).ok
    free_bytes = size - 1
    began = time.monotonic()
    store.save(5, some(5), RunState())
    assert time.monotonic() - began < 1.0, "training goes on"
    time.sleep(0.3)
    assert sorted(os.listdir(store.root)) == [*(f"step-0000000{n}.deleting-000" for n in (1, 2, 3)), "step-00000004"]
    slow.gate.set()
    assert [result.error for result in store.wait()] == [None]
    store.close()
    assert os.listdir(store.root) == ["step-00000005"]


def train_on_a_slow_disk(config: dict[str, Any]) -> int:
    unlink = disk.unlink

    def slowly(path: str) -> None:
        time.sleep(0.1 if ".deleting-" in path else 0.0)
        unlink(path)

    disk.unlink = slowly
    return train_here(config, debug=False)


def test_a_run_ends_when_all_is_deleted(tmp_path: Path) -> None:
    keep = {"last": 1, "best": False}
    config = tiny(tmp_path, train__steps=5, checkpoint__every_steps=1, checkpoint__keep=keep)
    assert run_ranks(2, train_on_a_slow_disk, config) == [0, 0]
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-00000005"]


@pytest.mark.parametrize("full", ["rank-00000", "rank-00001", "manifest.json"])
def test_a_disk_that_is_full_of_what_is_being_deleted_takes_the_save_at_a_second_try(
    tmp_path: Path, slow: SlowDisk, full: str
) -> None:
    """A quota, which no free space tells of: every write fails until the delete is done."""
    said: list[str] = []
    stores = pair(tmp_path / "checkpoints", keep=KEEP_ONE)
    for store in stores:
        store._say = said.append
    root, failed = stores[0].root, []

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name == "write" and full in operation.path and deleting(root):
            failed.append(operation.path)
            threading.Timer(0.2, slow.gate.set).start()
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), operation.path)
        yield

    def save_both(step: int) -> list[str | None]:
        for rank, store in enumerate(stores):
            store.save(step, halves(step, rank), RunState())
        return [result.error for store in stores for result in store.wait()]

    assert save_both(1) == [None, None]
    assert save_both(2) == [None, None]
    disk.observer = observe
    try:
        assert save_both(3) == [None, None]
    finally:
        disk.observer = None
    assert len(failed) == 1
    (line,) = said
    assert "Disk quota exceeded" in line
    assert line.endswith("; once more, when older ones are deleted")
    assert save_both(4) == [None, None]
    for store in stores:
        store.close()
    assert os.listdir(root) == ["step-00000004"]
    assert torch.equal(Checkpoint(root / "step-00000004").read("a"), torch.tensor([4, 4, 5, 5.0]))


@pytest.mark.parametrize(("saves_before", "tries"), [(1, ["000-2"]), (2, ["000-3", "000-3-again"])])
def test_a_disk_that_stays_full_fails_the_save(
    tmp_path: Path, slow: SlowDisk, saves_before: int, tries: list[str]
) -> None:
    """At once when nothing is being deleted, at the second try otherwise. Nothing is tried for ever."""
    found: list[str] = []

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name == "mkdir":
            found.append(operation.path.rpartition(".partial-")[2])
            slow.gate.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)
        yield

    store = CheckpointStore(tmp_path / "checkpoints", keep=KEEP_ONE)
    for step in range(saves_before):
        assert save(store, step).ok
    disk.observer = observe
    try:
        result = save(store, 9)
    finally:
        disk.observer = None
    assert "No space left" in str(result.error)
    assert found == tries
    assert save(store, 10).ok
