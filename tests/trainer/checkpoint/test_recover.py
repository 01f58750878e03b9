"""A bad file is repaired from other copies of the same bytes, block by block, or refused as before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_faults import flip, signed, truncate, whole

from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from tests.distributed import tiny, train
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.files import BLOCK_BYTES
from trainer.checkpoint.keep.recover import recover
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.life.events import read_events
from trainer.life.folder import RunFolder

MODEL, FROZEN = "model/rank-00000.safetensors", "frozen/rank-00000.safetensors"
FIXED = torch.arange(2 * BLOCK_BYTES // 4 + 1000, dtype=torch.float32)  # two blocks and a part of one


def save(root: Path, step: int, attempt: int | None = None, links: CheckpointStore | None = None) -> CheckpointStore:
    """Save a step in its own attempt, which writes the frozen tensors anew; or linked to a store's last save."""
    keep = KeepSection(last=9)
    store = links or CheckpointStore(
        root, attempt=attempt or step, asynchronous=False, keep=keep, say=lambda line: None
    )
    pieces = [whole("a", "model", torch.full((40,), float(step))), whole("f", "frozen", FIXED)]
    store.save(step, pieces, RunState(position={"consumed_samples": step}))
    assert [result.error for result in store.poll()] == [None]
    return store


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(root, step)
    said: list[str] = []
    made = Shelf(root, KeepSection(last=9), said.append)
    made.said = said  # type: ignore[attr-defined]
    return made


def said(shelf: Shelf) -> list[str]:
    lines: list[str] = shelf.said  # type: ignore[attr-defined]
    return lines


def is_whole(shelf: Shelf, step: int) -> None:
    checkpoint = Checkpoint(shelf.path(step))
    checkpoint.verify()
    assert torch.equal(checkpoint.read("f"), FIXED)
    assert not [path.name for path in (shelf.path(step) / "frozen").iterdir() if path.name.startswith(".")]


def symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


OPENING: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "truncated": lambda path: truncate(path, BLOCK_BYTES + 7),
    "emptied": lambda path: truncate(path, 0),
    "longer": lambda path: path.open("ab").write(b"x"),
    "a symlink": symlink,
    "its folder gone": lambda path: shutil.rmtree(path.parent),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("kind", OPENING)
def test_what_opening_notices_is_recovered(shelf: Shelf, kind: str) -> None:
    OPENING[kind](shelf.path(3) / FROZEN)
    with pytest.raises(BadCheckpoint):
        Checkpoint(shelf.path(3))
    found = shelf.newest_good()
    assert found is not None
    assert found.step == 3
    is_whole(shelf, 3)
    assert len(said(shelf)) == 1
    assert f"step-00000003/{FROZEN} was bad" in said(shelf)[0]


READING: dict[str, Callable[[Path], object]] = {
    "first block": lambda path: flip(path, 30),
    "middle block": lambda path: flip(path, BLOCK_BYTES + 5),
    "last block": lambda path: flip(path, -1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("kind", READING)
def test_what_reading_notices_is_recovered(shelf: Shelf, kind: str) -> None:
    path = shelf.path(3) / FROZEN
    READING[kind](path)
    assert shelf.mend(3, {path})
    is_whole(shelf, 3)
    flip(path, 30)  # bad again in the same start: the bytes are not the cause
    assert not shelf.mend(3, {path})


def test_each_block_comes_from_wherever_it_is_good(shelf: Shelf) -> None:
    for step, block in ((1, 2), (2, 0), (3, 2)):
        flip(shelf.path(step) / FROZEN, block * BLOCK_BYTES + 100)
    flip(shelf.path(3) / FROZEN, 100)
    shelf.reject(2, "for this test")
    assert shelf.mend(3, {shelf.path(3) / FROZEN})
    is_whole(shelf, 3)
    assert "2 of 3 blocks from step-00000001, step-00000002.bad-0" in said(shelf)[-1]


def test_another_name_of_the_same_bytes_is_no_copy(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    store = save(root, 1)
    save(root, 2, links=store)
    shelf = Shelf(root, KeepSection(last=9), print)
    path = shelf.path(2) / FROZEN
    assert path.samefile(shelf.path(1) / FROZEN)
    flip_in_place(path, 100)
    assert path.samefile(shelf.path(1) / FROZEN)
    assert not shelf.mend(2, {path})
    with pytest.raises(BadCheckpoint, match=rf"bytes 0 to {BLOCK_BYTES}.*no other copy"):
        recover(shelf.path(2), root, {path}, print)
    save(root, 3)  # a new copy
    assert Shelf(root, KeepSection(last=9), print).mend(2, {path})
    is_whole(shelf, 2)


def flip_in_place(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 8]))


def test_without_a_copy_it_is_refused_and_nothing_changes(shelf: Shelf) -> None:
    """A model file differs from step to step, though its size is equal: no block of another one fits."""
    path = shelf.path(3) / MODEL
    flip(path, -1)
    before = path.read_bytes()
    assert not shelf.mend(3, {path})
    assert path.read_bytes() == before
    assert "bytes" in said(shelf)[0]
    path.unlink()
    found = shelf.newest_good()
    assert found is not None
    assert found.step == 2
    assert not path.exists()


def test_a_copy_counts_by_its_blocks_not_by_its_checksums(shelf: Shelf) -> None:
    """Other folders' checksums are right but their blocks are bad, and the reverse."""
    path = shelf.path(3) / FROZEN
    for step in (1, 2, 3):
        flip(shelf.path(step) / FROZEN, 100)
    assert not shelf.mend(3, {path})
    flip(shelf.path(2) / FROZEN, 100)
    for name in ("checksums.json", "manifest.json"):
        (shelf.path(2) / name).unlink()
    assert Shelf(shelf.root, KeepSection(last=9), print).mend(3, {path})
    is_whole(shelf, 3)


def test_a_source_holds_copies_but_is_never_written(tmp_path: Path) -> None:
    other, root = tmp_path / "other", tmp_path / "checkpoints"
    for folder in (other, root):
        save(folder, 1)
    manifest = root / "step-00000001/manifest.json"
    fields = json.loads(manifest.read_bytes())
    fields["sources"] = [{"path": str(other / "step-00000001"), "step": 1, "digest": "0" * 32}]
    manifest.write_bytes(signed(fields))
    said: list[str] = []
    path = root / "step-00000001" / FROZEN
    flip(path, 100)
    assert recover(path.parent.parent, root, {path}, said.append) == [FROZEN]
    is_whole(Shelf(root, KeepSection(), print), 1)
    path = other / "step-00000001" / FROZEN
    flip(path, 100)
    save(other, 2)
    with pytest.raises(BadCheckpoint, match="not this run's"):
        recover(path.parent.parent, root, {path}, said.append)


def test_a_checkpoint_that_describes_itself_badly_is_not_recovered(shelf: Shelf) -> None:
    for step, name in ((3, "manifest.json"), (2, "checksums.json")):
        flip(shelf.path(step) / name, 40)
        with pytest.raises(BadCheckpoint, match=name):
            recover(shelf.path(step), shelf.root, (), print)


def test_a_save_that_takes_over_a_bad_file_is_mended_for_the_next(shelf: Shelf) -> None:
    """A frozen tensor need not be read when a run starts, only when its files are copied. The save that meets the bad
    block fails, and the next one succeeds."""
    said: list[str] = []
    store = CheckpointStore(shelf.root, attempt=9, keep=KeepSection(last=9), asynchronous=False, say=said.append)
    store.adopt(Checkpoint(shelf.path(3)), {"f": "f"}, lineage=True, foreign=False)
    flip(shelf.path(3) / FROZEN, 100)
    results = []
    for _ in range(2):
        store.save(4, [whole("a", "model", torch.full((40,), 4.0))], RunState(position={"consumed_samples": 4}))
        results += store.poll()
    assert [result.ok for result in results] == [False, True]
    assert "checksum" in str(results[0].error)
    assert "is whole again" in said[0]
    for step in (3, 4):
        Checkpoint(shelf.path(step)).verify()


def test_no_room_for_the_copy_is_a_persons_matter(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falling back would throw away steps that some free space would save."""

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    (shelf.path(3) / FROZEN).unlink()
    monkeypatch.setattr("trainer.checkpoint.format.disk.os.write", full)
    with pytest.raises(UserError, match="No space left"):
        shelf.newest_good()
    assert shelf.steps() == [1, 2, 3]
    assert list((shelf.path(3) / "frozen").iterdir()) == []


def test_what_a_crash_left_of_it_goes_at_the_next_start(shelf: Shelf) -> None:
    (shelf.path(2) / "frozen/.rank-00000.safetensors.mending").write_bytes(b"half")
    shelf.clean()
    is_whole(shelf, 2)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on_from_a_recovered_checkpoint(size: int, tmp_path: Path) -> None:
    first = tiny(tmp_path / "first", train__steps=2)
    assert train(first) == [0]
    config = tiny(tmp_path, start__from=str(tmp_path / "first/run"), freeze__frozen=["embed.*", "blocks.0.*"])
    config |= {"train": {**config["train"], "steps": 2}, "checkpoint": {"every_steps": 2}}
    assert train(config, size) == [0] * size
    config["train"]["steps"] = 4
    assert train(config, size) == [0] * size  # another attempt has its own copy
    newest = tmp_path / "run/checkpoints/step-00000004"
    flip(sorted((newest / "frozen").iterdir())[-1], -1)
    config["train"]["steps"] = 6
    assert train(config, size) == [0] * size
    events = [e for e in read_events(RunFolder(tmp_path / "run")) if e["event"].startswith("checkpoint_")]
    assert [(e["event"], e["checkpoint"]) for e in events] == [("checkpoint_recovered", newest.name)] * size
    started = [e["step"] for e in read_events(RunFolder(tmp_path / "run")) if e["event"] == "started"]
    assert max(started) == 4
