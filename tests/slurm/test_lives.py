"""What the lives of a job leave behind, and how failures are counted over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.run_folder import Outcome, outcomes
from slurm import again
from slurm.again import Job
from slurm.lives import Left, Life, end_of_life, failures_without_progress, lives_of
from trainer.folder import RunFolder
from trainer.life import FAILED, REQUEUE, USER_ERROR, Attempt, End

STOPPED = End("stopped", 5, "step-00000005", requeue=True, cause="warning")


def outcome(life: int, reason: str, step: int) -> Outcome:
    return Outcome("7", life, reason, None, step, 1, "scontrol", [], float(life))


def count(folder: Path, lives: list[tuple[str, int]], step: int) -> int:
    run = RunFolder(folder)
    run.root.mkdir()
    for number, (reason, at) in enumerate(lives):
        Life(run, "7", number).end(outcome(number, reason, at))
    assert [o.life for o in outcomes(run)] == list(range(len(lives)))
    return failures_without_progress(run, step)


@pytest.mark.parametrize(
    ("lives", "step", "failures"),
    [
        ([], 0, 0),
        ([("failed", 5), ("failed", 5)], 5, 2),
        ([("failed", 5), ("stopped", 5), ("failed", 5)], 5, 2),  # a preemption counts for nothing, and excuses nothing
        ([("failed", 0), ("failed", 5)], 5, 1),  # the first came before the checkpoint
        ([("failed", 5), ("failed", 5)], 6, 0),
        ([("failed", 5), ("finished", 5), ("failed", 5)], 5, 1),
    ],
)
def test_failures_are_counted_since_the_last_checkpoint(
    lives: list[tuple[str, int]], step: int, failures: int, tmp_path: Path
) -> None:
    assert count(tmp_path / "run", lives, step) == failures


def test_a_mistake_that_touched_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    life = Life(run, "7", 0)
    life.leave(Left("node1", FAILED, -1))
    assert not run.root.exists()
    run.root.mkdir()
    life.leave(Left("node1", USER_ERROR, -1))
    assert list(run.root.iterdir()) == []
    life.leave(Left("node1", REQUEUE, -1))
    life.leave(Left("node2", USER_ERROR, -1))  # now there is something
    assert life.left() == {"node1": Left("node1", REQUEUE, -1), "node2": Left("node2", USER_ERROR, -1)}
    assert Life(run, "7", 1).left() == {}
    assert lives_of(run).is_dir()


def test_an_end_is_that_of_an_attempt_of_this_life(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert end_of_life(run, {"node1": Left("node1", 0, -1)}) is None
    Attempt.open(run).write_end(STOPPED)
    assert end_of_life(run, {"node1": Left("node1", 0, -1), "node2": Left("node2", 0, 0)}) == STOPPED
    assert end_of_life(run, {"node1": Left("node1", 0, 0)}) is None  # that was an earlier life's
    assert end_of_life(run, {}) is None


def test_a_node_is_excluded_where_enough_others_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "node1 mixed\nnode2 down*\nnode3 idle\nnode4 drained\n"
    monkeypatch.setattr(again, "patiently", lambda *command: answer)
    job = Job("7", True, False, False, 0.0, "low", 1, [])
    told: list[str] = []
    assert again.to_exclude(job, ["node1"], told.append) == ["node1"]
    assert again.down(["node1", "node2"]) == ["node2"]
    assert told == []
    two = Job("7", True, False, False, 0.0, "low", 2, ["node2"])
    assert again.to_exclude(two, ["node1"], told.append) == ["node2"]
    assert told == ["node1: not excluded, as partition low has too few other nodes"]
