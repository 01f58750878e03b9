"""A conversion that fails, at any operation, leaves a whole target or none, and no thread."""

from __future__ import annotations

import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from launch.checkpoint.convert.convert import convert, open_state
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore")


def small_state(root: Path) -> Path:
    """A tensor of each group, one without dimensions, one without elements: few operations, and one of every kind."""
    tensors: dict[str, tuple[Group, torch.Tensor]] = {
        "w": ("model", torch.randn(3, 4)),
        "f": ("frozen", torch.tensor(0.5)),
        "w.exp_avg": ("optim", torch.randn(3, 4)),
        "none": ("model", torch.empty(0, 3)),
    }
    pieces = [Piece(k, group, t, tuple(t.shape), (0,) * t.ndim, tuple(t.shape)) for k, (group, t) in tensors.items()]
    store = CheckpointStore(root, asynchronous=False)
    store.save(1, pieces, RunState(step_counts={"w": 1}, aliases={"tied": "w"}))
    assert [result.error for result in store.poll()] == [None]
    return store.shelf.path(1)


@pytest.mark.parametrize("to", ["muster", "torch", "dcp"])
def test_a_failure_at_any_operation_leaves_nothing(tmp_path: Path, to: Any) -> None:
    """Each operation on the disk fails once, as on a full disk. The target is then whole or missing, and no thread
    reads on."""
    source, folder = small_state(tmp_path / "checkpoints"), tmp_path / "target"
    folder.mkdir()
    threads = set(threading.enumerate())
    operations = 0
    failing = -1

    def observer(operation: disk.Operation) -> Any:
        nonlocal operations
        operations += 1
        if operations - 1 == failing:
            raise OSError(28, "No space left on device")
        return nullcontext()

    try:
        disk.observer = observer
        convert(source, folder / "x", to)
        (shutil.rmtree if (folder / "x").is_dir() else Path.unlink)(folder / "x")
        total, committed = operations, 0
        for failing in range(total):
            operations = 0
            with pytest.raises(UserError, match="disk is full"):
                convert(source, folder / "x", to)
            assert operations >= failing
            assert set(threading.enumerate()) == threads
            left = [path.name for path in folder.iterdir()]
            assert left in ([], ["x"]), (failing, left)
            if left:
                committed += 1
                open_state(folder / "x")
                (shutil.rmtree if (folder / "x").is_dir() else Path.unlink)(folder / "x")
        assert committed == 1  # the last fsync, of the folder above, comes after the rename
        assert total >= 6
    finally:
        disk.observer = None
