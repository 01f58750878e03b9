"""The state of a run in true words: the phase that `launch watch` shows, the mistake itself, and what is a restart."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.look.run_folder import view
from launch.look.watch import Watcher
from slurm.look.queue import Job, Queue
from slurm.look.state import state_of
from tests import made_up
from tests.slurm.stand_ins import SLURM, verb
from tests.slurm.test_status import begun, one, over, requeued, silent, training
from trainer.life.attempts import End
from trainer.life.events import append_row
from trainer.life.folder import RunFolder

RUNNING = Queue({"7": Job("7", "RUNNING", "None", 2, "node[1-2]", 600.0, 0, None)})
STOPPED_BY_HAND = End("stopped", 50, "step-00000050", False, "stop_file")
PREEMPTED = End("stopped", 40, "step-00000040", True, "warning")
FINISHED = End("finished", 1000, "step-00001000", False)


def seen(run: Path, phase: str, age_s: float = 1.0, attempt: int = 0) -> None:
    """Write a row of a node's monitor."""
    (run / "gpu").mkdir(exist_ok=True)
    row = made_up.second(1, 2, age_s) | {"attempt": attempt}
    row["ranks"] = [rank | {"phase": phase} for rank in row["ranks"]]
    append_row(run / "gpu/node1.jsonl", row)
    os.utime(run / "gpu/node1.jsonl", (time.time() - age_s,) * 2)


@pytest.mark.parametrize(
    ("make", "phase", "state"),
    [
        (begun, "preparing", "starting (preparing)"),
        (begun, "compiling", "starting (compiling)"),
        (begun, "starting", "starting"),
        (begun, "computing", "running (computing)"),  # the first row of metrics may come much later
        (training, "waiting_for_data", "running (waiting for data)"),
        (training, "starting", "running (starting)"),  # freeze.schedule builds a new engine
        (silent, "validating", "no step for 15 min (validating)"),
    ],
)
def test_a_run_is_at_what_launch_watch_says(
    make: Callable[[Path], None], phase: str, state: str, tmp_path: Path
) -> None:
    make(tmp_path)
    seen(tmp_path, "saving", attempt=1)  # of another attempt
    seen(tmp_path, phase)
    assert state_of(view(tmp_path), RUNNING, []) == state
    if not state.startswith("no step"):
        assert Watcher(RunFolder(tmp_path))._state(0) == state
    (tmp_path / "gpu/node1.jsonl").unlink()
    seen(tmp_path, phase, age_s=60.0)  # old rows count for nothing
    assert "(" not in state_of(view(tmp_path), RUNNING, [])


def test_watch_and_status_agree_on_what_died_and_what_is_over(tmp_path: Path) -> None:
    training(tmp_path)
    seen(tmp_path, "computing", age_s=60.0)
    os.unlink(tmp_path / "LEASE")
    assert Watcher(RunFolder(tmp_path))._state(0) == state_of(view(tmp_path), Queue(), []) == "died"
    over(tmp_path / "other")
    seen(tmp_path / "other", "leaving")
    assert Watcher(RunFolder(tmp_path / "other"))._state(0) == "finished"
    assert view(tmp_path / "other").phase is None


@pytest.mark.parametrize("array", [False, True])
def test_a_mistake_is_told_by_its_first_line(array: bool, tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    made_up.submitted(run, "7")
    made_up.outcome(run, "7", 0, "failed", "mistake")
    place = tmp_path / "runs/slurm" if array else run / "slurm"
    place.mkdir(exist_ok=True)
    (place / "7_0_log.out").write_text(
        "error: node1: an earlier life's\nnode1: step 1\n"
        "error: node1: data.sources.0.path: /data/x does not exist\nname a folder\n"
        "srun: error: node1: task 0: Exited with exit code 2\n"
    )
    done = verb(tmp_path, "status", **SLURM)
    assert one(done)["state"] == "failed (mistake)"
    assert "runs/r: error: node1: data.sources.0.path: /data/x does not exist" in done.stdout.splitlines()
    assert "name a folder" not in done.stdout
    (place / "7_0_log.out").unlink()
    os.mkfifo(place / "7_0_log.out")  # a pipe is not waited for
    assert one(verb(tmp_path, "status", **SLURM))["state"] == "failed (mistake)"
    assert "it is a pipe, not a file" in verb(tmp_path, "logs", "runs/r", **SLURM).stderr


def test_where_only_slurm_knows_of_the_mistake(tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    made_up.submitted(run, "7")
    (run / "slurm/7_0_log.out").write_text("error: CONFIG: unknown key\n")
    done = verb(tmp_path, "status", **SLURM | {"sacct": "7|FAILED|1795350417|1795350516|node1|2:0\n"})
    assert one(done)["state"] == "failed (exit code 2)"
    assert "runs/r: error: CONFIG: unknown key" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("ends", "restarts"),
    [
        ([], "0"),
        ([STOPPED_BY_HAND], "0"),
        ([FINISHED, STOPPED_BY_HAND], "0"),
        ([PREEMPTED], "1: warning"),
        ([None], "1: died"),
        ([PREEMPTED, STOPPED_BY_HAND], "1"),
        ([STOPPED_BY_HAND, PREEMPTED, None], "2: died"),
        ([End("failed", 3, None, False, "giving_up")], "0"),
        ([End("failed", 3, None, True, "rank_failed")], "1: rank_failed"),
    ],
)
def test_a_start_by_a_person_is_no_restart(ends: list[End | None], restarts: str, tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    for number, end in enumerate([*ends, None]):
        made_up.attempt(run, number, end)
    assert one(verb(tmp_path, "status", **SLURM))["restarts"] == restarts


def test_a_preempted_run_that_waits_is_not_restarted_yet(tmp_path: Path) -> None:
    requeued(tmp_path)
    assert view(tmp_path).restarts == 0
