"""Saving: which checkpoints are kept, which files are linked, and what happens when a save fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.errors import Superseded
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore, SaveResult


def whole(key: str, group: Group, tensor: torch.Tensor) -> Piece:
    return Piece(key, group, tensor, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape))


def some(step: int) -> list[Piece]:
    return [
        whole("a", "model", torch.full((3,), float(step))),
        whole("a.m", "optim", torch.full((3,), step / 3)),
        whole("f", "frozen", torch.arange(100.0)),
    ]


def save(store: CheckpointStore, step: int, metric: float | None = None, state: RunState | None = None) -> SaveResult:
    store.save(step, some(step), state or RunState(), metric)
    (result,) = store.wait()
    return result


@pytest.fixture
def failing() -> Iterator[list[str]]:
    """Operations whose name is in the list fail with "no space left"."""
    names: list[str] = []

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)
        yield

    disk.observer = observe
    yield names
    disk.observer = None


def test_the_tensors_may_change_once_save_returns(tmp_path: Path) -> None:
    weight, frozen = torch.zeros(2_000_000), torch.ones(3)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, [whole("w", "model", weight), whole("f", "frozen", frozen)], RunState(loop={"best": 1.5}))
    weight.fill_(7)
    (result,) = store.wait()
    assert result.ok
    assert result.stall_s <= result.seconds
    checkpoint = Checkpoint(store.shelf.path(1))
    assert torch.equal(checkpoint.read("w"), torch.zeros(2_000_000))
    assert checkpoint.manifest.loop == {"best": 1.5}
    assert checkpoint.manifest.tensors["w"].trained_step == 1
    assert checkpoint.manifest.tensors["f"].trained_step == 0


def test_keep(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=KeepSection(last=2, every_steps=4, best=True))
    for step, metric in enumerate([None, 3.0, 1.0, float("nan"), 2.0, 5.0, None, 9.0], start=1):
        assert save(store, step, metric).ok
    assert store.shelf.steps() == [3, 4, 7, 8]
    again = CheckpointStore(tmp_path / "checkpoints", attempt=1, keep=KeepSection(last=1, best=True))
    assert save(again, 9).ok
    assert again.shelf.steps() == [3, 9], "the best one is known from the manifests"


def test_frozen_tensors_are_linked_and_now_and_then_fresh(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=KeepSection(last=50))
    sizes = [save(store, step).bytes_written for step in range(1, 13)]
    paths = [store.shelf.path(step) / "frozen/rank-00000.safetensors" for step in range(1, 13)]
    inodes = [path.stat().st_ino for path in paths]
    assert len(set(inodes[:10])) == 1
    assert len(set(inodes)) == 2
    assert inodes[10] == inodes[11]
    assert sizes[1] < sizes[0] == sizes[10]
    for step in range(1, 13):
        Checkpoint(store.shelf.path(step)).verify()
    fresh = CheckpointStore(tmp_path / "checkpoints", attempt=1, keep=KeepSection(last=50))
    assert save(fresh, 14).bytes_written == sizes[0], "a new attempt writes afresh"


def test_what_trains_again_is_written_again(tmp_path: Path) -> None:
    """A frozen tensor stays in its file until the store hears that the tensor trains again. Then its new values are
    written, and later saves link to them once it is frozen again."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=KeepSection(last=50))
    first = save(store, 1)
    assert save(store, 2).bytes_written < first.bytes_written
    trained = [whole("a", "model", torch.ones(3)), whole("f", "model", torch.arange(100.0) + 1)]

    def results(step: int, pieces: list[Piece], trained_steps: dict[str, int]) -> SaveResult:
        store.save(step, pieces, RunState(trained_steps=trained_steps))
        (result,) = store.wait()
        return result

    unsaid = results(3, trained, {})
    assert not unsaid.ok
    assert unsaid.error is not None
    assert "ranks disagree about f: model F32 [100] and frozen F32 [100]" in unsaid.error
    store.adopt(None, {}, lineage=True, foreign=False)
    assert results(4, trained, {}).ok
    again = [whole("a", "model", torch.ones(3)), whole("f", "frozen", torch.arange(100.0) + 1)]
    assert results(5, again, {"f": 4}).bytes_written > 400, "trained since: written, not linked"
    assert results(6, again, {"f": 4}).bytes_written < 400
    for step, values, trained_step in ((2, 0, 0), (4, 1, 4), (5, 1, 4), (6, 1, 4)):
        checkpoint = Checkpoint(store.shelf.path(step))
        assert torch.equal(checkpoint.read("f"), torch.arange(100.0) + values)
        assert checkpoint.manifest.tensors["f"].trained_step == trained_step


def test_where_links_are_impossible_the_file_is_written(tmp_path: Path, failing: list[str]) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    first = save(store, 1)
    failing.append("link")
    assert save(store, 2).bytes_written == first.bytes_written
    Checkpoint(store.shelf.path(2)).verify()


@pytest.mark.parametrize("name", ["mkdir", "create", "write", "fsync", "fsync_dir", "rename"])
def test_a_full_disk_keeps_the_last_good_one_and_the_next_save_succeeds(
    tmp_path: Path, failing: list[str], name: str
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert save(store, 1).ok
    failing.append(name)
    result = save(store, 2)
    assert not result.ok
    assert result.error is not None
    assert "No space left" in result.error
    assert sorted(os.listdir(store.root)) == ["step-00000001"]
    failing.clear()
    assert save(store, 3).ok
    assert store.shelf.steps() == [1, 3]


def test_every_single_write_may_be_the_one_that_fails(tmp_path: Path) -> None:
    """ENOSPC at each operation of a save in turn never gives half a commit."""
    for point in range(200):
        store = CheckpointStore(tmp_path / str(point), keep=KeepSection(last=1))
        assert save(store, 1).ok
        count = -1

        @contextmanager
        def observe(operation: disk.Operation, point: int = point) -> Iterator[None]:
            nonlocal count
            count += 1
            if count == point:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)
            yield

        disk.observer = observe
        try:
            result = save(store, 2)
        finally:
            disk.observer = None
        store.shelf.clean()
        newest = store.shelf.newest_good()
        assert newest is not None
        newest.verify()
        assert newest.step == 2 or not result.ok
        assert save(store, 3).ok
        if count < point:
            assert result.ok
            return
    raise AssertionError("a save has no 200 operations")


def test_a_real_full_disk(tmp_path: Path) -> None:
    """On a filesystem of 1 MiB, where it can be mounted (as root): a write fails in the middle of a file."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        return  # the tests with an observer above must do
    try:
        store = CheckpointStore(tmp_path / "checkpoints")
        assert save(store, 1).ok
        store.save(2, [whole("a", "model", torch.ones(1_000_000))], RunState())
        (result,) = store.wait()
        assert "No space left" in str(result.error)
        assert sorted(os.listdir(store.root)) == ["step-00000001"]
        assert save(store, 3).ok
        with pytest.raises(
            UserError, match=r"KiB free, but 2 more checkpoints of 1\.86 GiB need 3\.73 GiB, 3\.72 GiB more: "
        ):
            store.shelf.check_space(2 * 10**9, 0, saves_to_come=2)
        store.shelf.check_space(1000, 1000, saves_to_come=9)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_superseded_attempt_commits_nothing(tmp_path: Path) -> None:
    newest = True
    store = CheckpointStore(tmp_path / "checkpoints", still_newest=lambda: newest)
    assert save(store, 1).ok
    newest = False
    store.save(2, some(2), RunState())
    with pytest.raises(Superseded, match="newer attempt"):
        store.wait()
    assert os.listdir(store.root) == ["step-00000001"]


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert save(store, 1).bytes_written > 0
    assert save(store, 1).bytes_written == 0
    assert store.shelf.steps() == [1]


def test_contradictions_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="does not fill"):
        store.save(1, [Piece("a", "model", torch.ones(3), (4,), (2,), (3,))], RunState())
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save(1, some(1), RunState(loop={"best": float("inf")}))
    store.save(1, [Piece("a", "model", torch.ones(3), (4,), (0,), (3,))], RunState())
    (result,) = store.wait()
    assert "the pieces hold 3 of 4 elements of shape [4] (a)" in str(result.error)
    assert os.listdir(store.root) == []


def test_leftovers_are_cleaned_and_strangers_are_not(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert save(store, 1).ok
    for name in ("step-00000002.partial-000-1", "step-00000001.deleting-000", "step-00000009.bad-0", "notes"):
        (store.root / name / "model").mkdir(parents=True)
        (store.root / name / "model" / "x").touch()
    assert store.shelf.clean() == ["step-00000001.deleting-000", "step-00000002.partial-000-1"]
    assert sorted(os.listdir(store.root)) == ["notes", "step-00000001", "step-00000009.bad-0"]


def pair(root: Path, **options: Any) -> list[CheckpointStore]:
    """Two ranks in one process, each with its own connection, as their saver threads have."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [CheckpointStore(root, rank, 2, kv=master, say=lambda line: None, **options) for rank in (0, 1)]


def halves(step: int, rank: int) -> list[Piece]:
    return [Piece("a", "model", torch.full((2,), float(step + rank)), (4,), (2 * rank,), (2,))]


def save_both(stores: list[CheckpointStore], step: int, second: list[Piece] | None = None) -> list[SaveResult]:
    for rank, store in enumerate(stores):
        store.save(step, second if second is not None and rank == 1 else halves(step, rank), RunState())
    return [result for store in stores for result in store.wait()]


def test_two_ranks_share_one_checkpoint(tmp_path: Path) -> None:
    stores = pair(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        results = save_both(stores, step)
        assert [result.error for result in results] == [None, None]
        assert results[0].bytes_written == results[1].bytes_written > 0
        read = Checkpoint(stores[0].shelf.path(step)).read("a")
        assert torch.equal(read, torch.tensor([step, step, step + 1, step + 1.0]))


def test_an_error_of_one_rank_reaches_all(tmp_path: Path) -> None:
    stores = pair(tmp_path / "checkpoints")
    assert all(result.ok for result in save_both(stores, 1))

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name == "write" and "rank-00001" in operation.path:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        yield

    disk.observer = observe
    try:
        results = save_both(stores, 2)
    finally:
        disk.observer = None
    assert [result.ok for result in results] == [False, False]
    assert all("rank 1" in str(result.error) and "quota" in str(result.error) for result in results)
    assert os.listdir(stores[0].root) == ["step-00000001"]
    results = save_both(stores, 2, second=[Piece("a", "model", torch.ones(2).double(), (4,), (2,), (2,))])
    assert all("ranks disagree about a" in str(result.error) for result in results)
    assert all(result.ok for result in save_both(stores, 2))


def test_messages_of_saves_are_forgotten_also_of_those_that_failed(tmp_path: Path, failing: list[str]) -> None:
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [CheckpointStore(tmp_path / "checkpoints", rank, 2, kv=master) for rank in (0, 1)]
    assert all(result.ok for result in save_both(stores, 1))
    held = master.num_keys()
    for step in range(2, 9):
        failing[:] = ["mkdir", "write", ""][step % 3 : step % 3 + 1]
        assert [result.ok for result in save_both(stores, step)] == [step % 3 == 2] * 2
    assert master.num_keys() == held


def test_a_silent_rank_fails_the_save_in_time(tmp_path: Path) -> None:
    stores = pair(tmp_path / "checkpoints", timeout_s=0.3)
    stores[0].save(1, halves(1, 0), RunState())
    (result,) = stores[0].wait()
    assert "no word from rank 1 after 0.3 s" in str(result.error)
    assert os.listdir(stores[0].root) == []
    stores[1].save(1, halves(1, 1), RunState())
    (late,) = stores[1].wait()
    assert late.error == result.error


def test_all_ranks_of_a_superseded_attempt_hear_it(tmp_path: Path) -> None:
    stores = pair(tmp_path / "checkpoints", still_newest=lambda: False)
    for rank, store in enumerate(stores):
        store.save(1, halves(1, rank), RunState())
    for store in stores:
        with pytest.raises(Superseded):
            store.wait()


def test_a_save_waits_for_the_one_before_and_counts_it(tmp_path: Path) -> None:
    gate = threading.Event()

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name == "rename" and "00000001" in operation.path:
            gate.wait(10)
        yield

    disk.observer = observe
    try:
        store = CheckpointStore(tmp_path / "checkpoints")
        store.save(1, some(1), RunState())
        assert store.poll() == []
        threading.Timer(0.2, gate.set).start()
        store.save(2, some(2), RunState())
        results = store.wait()
    finally:
        disk.observer = None
    assert [result.step for result in results] == [1, 2]
    assert results[1].stall_s > 0.15


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "none", KeepSection(), print)
    assert shelf.steps() == []
    assert shelf.clean() == []
    assert shelf.newest_good() is None


def test_host_memory_of_a_save_is_one_copy_and_a_block(tmp_path: Path) -> None:
    """200 MB change, 100 MB are frozen. The peak grows by 200 MB, a block and little else, also at a second save."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    copy, grown = map(int, done.stdout.split())
    print(f"{copy / 1e6:.1f} MB of changing tensors, peak grown by {grown / 1e6:.1f} MB")
    assert copy <= grown <= copy + (4 << 20) + (4 << 20)
