"""Killed inside a save of a real run. The next start finds the checkpoint before or the new one, whole, and goes on to
the same bits. (tests/trainer/checkpoint kills at every operation of a save of made-up pieces.)"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import RanksFailed
from tests.life.runs import Watched, finish_here, samples_are_consecutive
from tests.life.test_life_steps import on_ranks
from tests.stored import Stored
from trainer.checkpoint.format import disk
from trainer.life.stop import StopWish
from trainer.run import Run

STEPS = 8  # saved after 3 and 6, and at the end
CHANGES = {"train__steps": STEPS, "optim__schedule": "constant", "data__record_samples": True}
POINTS = [  # (rank, operation, after): killed at its first such operation in the save of step 6, before or after it
    (0, "mkdir", False),
    (1, "create", False),
    (0, "write", True),
    (1, "write", True),
    (1, "fsync", False),
    (0, "fsync", True),
    (0, "rename", False),
    (0, "rename", True),
]


def die_at(run: Run, wish: StopWish, folder: Path, rank: int, name: str, done: bool) -> None:
    """Kill all ranks at once, as when a node dies."""
    (folder / f"pid-{run.world.rank}").write_text(str(os.getpid()))

    def die() -> None:
        others = [int(path.read_text()) for path in folder.glob("pid-*") if path.name != f"pid-{run.world.rank}"]
        for pid in (*others, os.getpid()):
            os.kill(pid, signal.SIGKILL)

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        here = operation.name == name and "step-00000006.partial" in str(operation.path)
        if here and not done:
            die()
        yield
        if here:
            die()

    if run.world.rank == rank:
        disk.observer = observe


def undisturbed(run: Run, wish: StopWish) -> None: ...


@pytest.mark.full
def test_killed_inside_a_save_it_goes_on_to_the_same_bits(engine: dict[str, Any], tmp_path: Path) -> None:
    changes, found = CHANGES | engine, {}
    for number, point in enumerate([None, *POINTS]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if point is None:
            run, outcomes = on_ranks(folder, 2, undisturbed, **changes)
            assert outcomes == [(0, STEPS), (0, STEPS)]
        else:
            with pytest.raises(RanksFailed, match="died"):
                on_ranks(folder, 2, die_at, folder, *point, **changes)
            run = finish_here(folder, STEPS)
            samples_are_consecutive(run)
            assert run.start_step(1) == (6 if point == (0, "rename", True) else 3), point
        assert run.folder.committed_steps()[-1] == STEPS
        found[point] = last_checkpoint(run)
    straight = found.pop(None)
    for point, ended in found.items():
        assert ended.tensors.keys() == straight.tensors.keys()
        assert [key for key in straight.tensors if not ended.same(straight, key)] == [], point


def last_checkpoint(run: Watched) -> Stored:
    return Stored(run.folder.checkpoints / f"step-{STEPS:08d}")
