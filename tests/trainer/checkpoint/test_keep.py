"""What `keep` deletes: never the last checkpoint that opens, and nothing that another one needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_faults import flip, signed, whole

from configs.schema import KeepSection
from trainer.checkpoint import shelf as shelf_module
from trainer.checkpoint.assemble import RunState
from trainer.checkpoint.load import Checkpoint
from trainer.checkpoint.shelf import Shelf
from trainer.checkpoint.store import CheckpointStore

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
    assert store.shelf.going() == [1]  # 5 and 2 open; 4 and 3, between them, are not deleted either
    assert store.shelf.steps() == [1, 2, 3, 4, 5]  # asking deletes nothing
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
    assert len(opened) == 9  # nothing to delete, nothing to look at


def test_what_another_one_refers_to_stays(tmp_path: Path) -> None:
    """A chain of references inside the run, and one into a folder that is not this run's."""
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
