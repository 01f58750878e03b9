"""Power loss at every point of two saves: only fsynced content is sure, and that is enough.

The code's own operations are recorded once. The tests then lose power after each operation, and keep any subset of the
rest. The same test without one fsync, or with an earlier rename, must find a broken checkpoint: each fsync is needed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import two_ranks
from power_loss import Disk, Step, choices, materialise
from test_crash import told_by

from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint

ROOT = "checkpoints"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Every operation of two saves by two ranks, from an empty run folder on."""
    folder = tmp_path_factory.mktemp("record")
    told_by(two_ranks, "record", folder)

    def relative(path: str) -> str:
        return os.path.relpath(path, folder / "run") if path else ""

    rows = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [
        Step(name, relative(path), relative(target), offset, bytes.fromhex(data or ""))
        for name, path, target, offset, data in rows
    ]


class Judge:
    """Tells what a start finds in a tree. Trees repeat often, so each one is made and read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, tuple[int | None, str | None]] = {}

    def find(self, tree: dict[str, bytes | None]) -> tuple[int | None, str | None]:
        """(step from which a start goes on, or None; the fault, or None). A fault is any committed name that is not
        whole, bit for bit, even when a newer one is good."""
        key = hash(frozenset(tree.items()))
        if key not in self._known:
            materialise(tree, self._folder)
            try:
                self._known[key] = self._start(self._folder / ROOT)
            finally:
                shutil.rmtree(self._folder)
        return self._known[key]

    def _start(self, root: Path) -> tuple[int | None, str | None]:
        shelf = Shelf(root, two_ranks.KEEP, lambda line: None)
        shelf.clean()
        try:
            for step in shelf.steps():
                two_ranks.is_whole(Checkpoint(shelf.path(step)))
        except (BadCheckpoint, AssertionError) as error:
            return None, f"step {step}: {error}"
        newest = shelf.newest_good()
        return (newest.step if newest else None), None


def lose_power_everywhere(steps: list[Step], judge: Judge, first: int = 0) -> Iterator[str]:
    """The faults over every prefix of the operations from `first` on, and all choices of what survives. From the
    operation after a commit's rename on (its fsync, unless the test left it out), the new checkpoint must exist."""
    rng = random.Random(7)
    disk = Disk()
    sure: int | None = None
    for index, step in enumerate(steps):
        disk.run(step)
        before = steps[index - 1]
        if index and before.name == "rename" and ".partial-" in before.path:
            sure = int(before.target[-8:])
        if index < first:
            continue
        for choice in choices(disk, rng):
            found, wrong = judge.find(disk.after_power_loss(choice))
            if wrong is None and (found or 0) < (sure or 0):
                wrong = f"step {sure} was committed, but {found} is found"
            if wrong:
                yield f"after operation {index} ({step.name} {step.path}): {wrong}"


def test_power_loss_at_every_operation(steps: list[Step], tmp_path: Path) -> None:
    judge = Judge(tmp_path / "run")
    assert list(lose_power_everywhere(steps, judge)) == []
    print(f"{len(steps)} operations, {len(judge._known)} different trees found after a power loss")
    found = {step for step, _ in judge._known.values()}
    assert found == {None, 1, 2}


def syncs(steps: list[Step]) -> dict[str, set[int]]:
    """The fsyncs of the code: what they make durable -> numbers of the operations. Those of the folder of checkpoints
    differ by the operation before them, all others by their path (both ranks sync a folder that they share)."""
    found: dict[str, set[int]] = {}
    for index, step in enumerate(steps):
        if step.name.startswith("fsync"):
            before = f" after {steps[index - 1].name} {steps[index - 1].path}" if step.path == ROOT else ""
            found.setdefault(step.path + before, set()).add(index)
    return found


@pytest.mark.full
def test_no_fsync_can_be_left_out(steps: list[Step], tmp_path: Path) -> None:
    """Without any one fsync, some power loss leaves a checkpoint that is not whole, or loses a committed one."""
    judge = Judge(tmp_path / "run")
    needless = []
    for name, left_out in syncs(steps).items():
        fewer = [step for index, step in enumerate(steps) if index not in left_out]
        first = max(0, min(left_out) - 1)
        if next(lose_power_everywhere(fewer, judge, first), None) is None:
            needless.append(name)
    assert needless == []
    print(f"{len(syncs(steps))} kinds of fsync, each needed")


def test_an_early_rename_is_found(steps: list[Step], tmp_path: Path) -> None:
    """If the commit's rename came before the manifest was written, a power loss would leave a broken checkpoint."""
    commit = max(index for index, step in enumerate(steps) if step.name == "rename" and ".partial-" in step.path)
    rename = steps[commit]
    early = max(i for i, s in enumerate(steps) if s.name == "create" and s.path == f"{rename.path}/manifest.json")
    moved = [
        replace(step, path=step.path.replace(rename.path, rename.target), target=step.target)
        for step in steps[early:commit]
    ]
    wrong = [*steps[:early], rename, *moved, *steps[commit + 1 :]]
    assert next(lose_power_everywhere(wrong, Judge(tmp_path / "run"), first=early), None) is not None
