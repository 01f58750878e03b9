"""The files that the lives of a job leave, and how failures are counted over them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs.config import Config
from launch.look import run_folder
from launch.look.run_folder import Outcome, outcomes
from slurm.job import again
from slurm.job.after import After
from slurm.job.again import Job
from slurm.job.lives import Left, Life, end_of_life, failures_without_progress, lives_of
from slurm.look.state import _last_outcome
from tests.distributed import tiny
from trainer.life.attempts import FAILED, REQUEUE, USER_ERROR, Attempt, End
from trainer.life.attempts import STOPPED as BY_A_PERSON
from trainer.life.events import Events, append_row
from trainer.life.folder import RunFolder

STOPPED = End("stopped", 5, "step-00000005", requeue=True, cause="warning")


def outcome(life: int, reason: str, step: int) -> Outcome:
    return Outcome("7", life, 0, reason, None, step, 1, "scontrol", [], float(life))


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
        ([("failed", 5), ("stopped", 5), ("failed", 5)], 5, 2),  # a preemption neither counts nor ends the count
        ([("failed", 0), ("failed", 5)], 5, 1),  # the first life came before the checkpoint
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
    life.leave(Left("node2", USER_ERROR, -1))  # now the folder exists
    assert life.left() == {"node1": Left("node1", REQUEUE, -1), "node2": Left("node2", USER_ERROR, -1)}
    assert Life(run, "7", 1).left() == {}
    assert lives_of(run).is_dir()


def test_the_last_outcome_is_that_of_the_last_life_though_the_clock_was_set_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    Life(run, "7", 0).end(replace(outcome(0, "failed", 5), time_s=2e9))
    Attempt.open(run).write_start(0, {"time_s": 2e9})
    Attempt.open(run).write_start(0, {"time_s": 2e9})  # by a clock that was set right later
    Life(run, "7", 1).end(replace(outcome(1, "stopped", 5), attempt=1, time_s=1e9))
    assert [o.life for o in outcomes(run)] == [0, 1]
    view = run_folder.view(run.root)
    assert [o.reason for o in view.outcomes] == ["failed", "stopped"]
    told = [view.outcome_of(run_folder.attempt_view(run, number)) for number in (0, 1)]
    assert [o and o.reason for o in told] == ["failed", "stopped"]
    last = _last_outcome(view)
    assert last is not None
    assert last.reason == "stopped"


@pytest.fixture
def after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> After:
    """What follows srun in life 1 of job 7 on two nodes, while Slurm says that the job runs."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setattr(again, "ask_job", lambda number: Job(number, True, False, False, "low", 2, []))
    monkeypatch.setattr(again, "names", lambda node_list: ["node1", "node2"])
    found = After(Config.model_validate(tiny(tmp_path)), 1)
    found.folder.root.mkdir()
    return found


def test_nodes_that_failed_are_told_by_the_life_that_events_name_not_by_their_time(after: After) -> None:
    for node in ("node1", "node2"):
        after.life.leave(Left(node, FAILED, -1))
    Events(after.folder, "node1", "launcher").write("agent_died", job="7", life=0)
    assert after._failed_nodes() == []  # from an earlier life, in the same second
    row = {"time_s": 1.0, "event": "agent_died", "job": "7", "life": 1}  # by a clock that stood in 1970
    append_row(after.folder.events / "node2-launcher.jsonl", row)
    assert after._failed_nodes() == ["node2"]


def test_a_node_that_was_told_to_end_is_not_lost_whatever_its_clock_said(after: After) -> None:
    after.life.leave(Left("node1", FAILED, -1))
    assert after._failed_nodes() == ["node2"]
    after.folder.events.mkdir()
    row = {"time_s": 1.0, "event": "stop_passed_on", "job": "7", "life": 1}
    append_row(after.folder.events / "node2-launcher.jsonl", row)
    assert after._failed_nodes() == []


@pytest.mark.parametrize(
    ("codes", "end", "code"),
    [
        ((REQUEUE, REQUEUE), End("stopped", 0, None, True, "before_an_attempt"), REQUEUE),
        ((REQUEUE, BY_A_PERSON), End("stopped", 0, None, False, "before_an_attempt"), BY_A_PERSON),
        ((BY_A_PERSON, FAILED), End("stopped", 0, None, False, "before_an_attempt"), BY_A_PERSON),
        ((REQUEUE, USER_ERROR), End("failed", 0, None, False, "mistake"), USER_ERROR),
        ((FAILED, FAILED), End("failed", 0, None, True, "start_failed"), FAILED),
    ],
)
def test_a_life_without_an_attempt(codes: tuple[int, int], end: End, code: int, after: After) -> None:
    for node, left in zip(("node1", "node2"), codes, strict=True):
        Life(after.folder, "7", 1).leave(Left(node, FAILED, -1))  # so that the folder exists
        after.life.leave(Left(node, left, -1))
    assert after._end() == (end, code)


def test_an_end_is_that_of_an_attempt_of_this_life(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert end_of_life(run, {"node1": Left("node1", 0, -1)}) is None
    Attempt.open(run).write_end(STOPPED)
    assert end_of_life(run, {"node1": Left("node1", 0, -1), "node2": Left("node2", 0, 0)}) == STOPPED
    assert end_of_life(run, {"node1": Left("node1", 0, 0)}) is None  # attempt 0 belongs to an earlier life
    assert end_of_life(run, {}) is None


def test_a_node_is_excluded_where_enough_others_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "node1 mixed\nnode2 down*\nnode3 idle\nnode4 drained\n"
    monkeypatch.setattr(again, "patiently", lambda *command: answer)
    job = Job("7", True, False, False, "low", 1, [])
    told: list[str] = []
    assert again.to_exclude(job, ["node1"], told.append) == ["node1"]
    assert again.down(["node1", "node2"]) == ["node2"]
    assert told == []
    two = Job("7", True, False, False, "low", 2, ["node2"])
    assert again.to_exclude(two, ["node1"], told.append) == ["node2"]
    assert told == ["node1: not excluded, as partition low has too few other nodes"]
