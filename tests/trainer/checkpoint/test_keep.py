"""`keep` never deletes the last checkpoint that opens, nor one that another needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_faults import flip, signed, whole

from configs.errors import UserError
from configs.load import load
from configs.schema.checkpoint import KeepSection
from trainer.checkpoint.keep import shelf as shelf_module
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.progress import saves_to_come

MODEL = "model/rank-00000.safetensors"


def save(store: CheckpointStore, step: int, metric: float | None = None) -> None:
    pieces = [whole("a", "model", torch.full((40,), float(step)))]
    store.save(step, pieces, RunState(position={"consumed_samples": step}), metric)
    assert [result.error for result in store.poll()] == [None]


def store_of(root: Path, said: list[str], **keep: int) -> CheckpointStore:
    return CheckpointStore(root, keep=KeepSection(**keep), asynchronous=False, say=said.append)


def test_only_those_that_open_count_among_the_last(tmp_path: Path) -> None:
    said: list[str] = []
    for step in (1, 2, 3, 4, 5):
        save(store_of(tmp_path / "c", said, last=9), step)
    (tmp_path / "c/step-00000004" / MODEL).unlink()
    flip(tmp_path / "c/step-00000003/manifest.json", 40)
    store = store_of(tmp_path / "c", said, last=2)
    assert store.shelf.going() == [1]  # 5 and 2 open; 4 and 3 between them are not deleted either
    assert store.shelf.steps() == [1, 2, 3, 4, 5]  # `going` deletes nothing
    save(store, 6)
    assert store.shelf.steps() == [5, 6]
    assert said == []


@pytest.mark.parametrize("name", ["manifest.json", "checksums.json", MODEL])
def test_nothing_is_deleted_while_the_newest_does_not_open(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    for step in (1, 2, 3):
        save(store_of(tmp_path / "c", said, last=9), step)
    hidden = (tmp_path / "c/step-00000003" / name).rename(tmp_path / "hidden")
    shelf = store_of(tmp_path / "c", said, last=1).shelf
    assert shelf.prune("000") == []
    assert shelf.steps() == [1, 2, 3]
    assert len(said) == 1
    assert f"step-00000003/{name}" in said[0]
    hidden.rename(tmp_path / "c/step-00000003" / name)
    assert shelf.prune("000") == [1, 2]


def test_a_save_opens_the_new_checkpoint_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "c", [], last=3)
    opened: list[str] = []

    class Counted(Checkpoint):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

    monkeypatch.setattr(shelf_module, "Checkpoint", Counted)
    for step in range(1, 10):
        save(store, step)
    assert store.shelf.steps() == [7, 8, 9]
    assert len(opened) == len(set(opened)) == 9
    shelf = Shelf(tmp_path / "c", KeepSection(last=3), print)
    assert shelf.going() == []
    assert len(opened) == 9  # nothing to delete, so nothing is opened


def test_what_another_one_refers_to_stays(tmp_path: Path) -> None:
    """A chain of references inside the run, and one into another run's folder."""
    for step in (1, 2, 3, 4, 5):
        save(store_of(tmp_path / "c", [], last=9), step)
    refer(tmp_path / "c/step-00000003", tmp_path / "c/step-00000001")
    refer(tmp_path / "c/step-00000005", tmp_path / "link/step-00000003", tmp_path / "elsewhere/step-00000002")
    (tmp_path / "link").symlink_to("c")
    shelf = Shelf(tmp_path / "c", KeepSection(last=1, best=False), print)
    assert shelf.going() == [2, 4]
    assert shelf.prune("000") == [2, 4]
    assert shelf.steps() == [1, 3, 5]


def refer(checkpoint: Path, *sources: Path) -> None:
    manifest = checkpoint / "manifest.json"
    fields = json.loads(manifest.read_bytes())
    fields["sources"] = [{"path": str(source), "step": 1, "digest": "0" * 32} for source in sources]
    manifest.write_bytes(signed(fields))


def test_the_best_one_must_open(tmp_path: Path) -> None:
    store = store_of(tmp_path / "c", [], last=1)
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
        save(store_of(tmp_path / "c", [], last=9), step, metric)
    (tmp_path / "c/step-00000002" / MODEL).unlink()
    save(store, 5, 9.0)
    assert store.shelf.steps() == [3, 5]


def shelf_for(root: Path, last: int, best: bool = True) -> Shelf:
    return Shelf(root / "c", KeepSection(last=last, best=best), print)


def test_room_is_asked_for_no_more_saves_than_are_to_come(tmp_path: Path) -> None:
    """The sizes are shares of the free space on this filesystem."""
    free = shutil.disk_usage(tmp_path).free
    shelf = shelf_for(tmp_path, last=9)
    shelf.check_space(free * 4 // 5, 0, saves_to_come=1)  # a run that saves only at its end
    shelf.check_space(free * 2, 0, saves_to_come=0)  # a finished run
    with pytest.raises(UserError, match=r"but 2 more checkpoints of .*: free some space or move run\.dir$"):
        shelf.check_space(free * 4 // 5, 0, saves_to_come=2)
    for step in (1, 2):
        save(store_of(tmp_path / "c", [], last=9), step)
    shelf_for(tmp_path, last=2).check_space(free * 2 // 5, 0, saves_to_come=100)  # 2 of 4 exist


def test_advice_about_room_is_of_use(tmp_path: Path) -> None:
    """The named value is enough; where no value is enough, none is named."""
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"8 more checkpoints .* or set checkpoint\.keep\.last=4$"):
        shelf_for(tmp_path, last=7, best=False).check_space(free * 2 // 11, 0, saves_to_come=100)
    shelf_for(tmp_path, last=4, best=False).check_space(free * 2 // 11, 0, saves_to_come=100)
    with pytest.raises(UserError, match=r"100 more checkpoints .* or set checkpoint\.keep\.last=4$"):  # at once
        shelf_for(tmp_path, last=10**9, best=False).check_space(free * 2 // 11, 0, saves_to_come=100)
    with pytest.raises(UserError, match=r"free some space or move run\.dir$"):
        shelf_for(tmp_path, last=7).check_space(free, 0, saves_to_come=100)


@pytest.mark.parametrize(
    ("changes", "step", "saves"),
    [
        ({"checkpoint.every_steps": 0}, 0, 1),
        ({"checkpoint.every_steps": 0}, 10, 0),
        ({"checkpoint.every_steps": 3}, 0, 4),  # 3, 6, 9, 10
        ({"checkpoint.every_steps": 5}, 0, 2),  # 5, 10
        ({"checkpoint.every_steps": 5}, 5, 1),
        ({"checkpoint.every_steps": 0, "train.validate_every_steps": 4}, 0, 3),  # 4, 8, 10
        ({"checkpoint.every_steps": 0, "train.validate_every_steps": 4, "checkpoint.keep.best": False}, 0, 1),
        ({"checkpoint.every_steps": 0, "freeze.schedule": [{"step": 2}]}, 0, 2),
    ],
)
def test_how_many_saves_are_to_come(changes: dict[str, Any], step: int, saves: int) -> None:
    config = load("demo", [f"{key}={json.dumps(value)}" for key, value in ({"train.steps": 10} | changes).items()])
    assert saves_to_come(config, step) == saves
