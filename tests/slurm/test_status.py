"""`python -m slurm status` and `watch`, on made-up run folders and stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from slurm.look import queue
from tests import made_up
from tests.machine import takes_at_most
from tests.slurm.jobs import ROOT
from tests.slurm.stand_ins import SLURM, commands, in_queue, verb
from trainer.life.attempts import End
from trainer.life.lease import _self_description

STOPPED = End("stopped", 40, "step-00000040", True, "warning")
FINISHED = End("finished", 1000, "step-00001000", False)
STOPPED_BY_HAND = End("stopped", 50, "step-00000050", False, "stop_file")
RANK_DIED = End("failed", 40, "step-00000040", True, "SIGKILL")
HEADER = ["run", "job", "state", "nodes", "step", "loss", "tokens/s", "left", "job left", "restarts", "checkpoint"]


def table(told: str) -> list[dict[str, str]]:
    """The rows of the first table."""
    lines = told.split("\n\n")[0].splitlines()[1:]
    cells = [[word.strip() for word in line.split("  ") if word.strip()] for line in lines]
    return [dict(zip(HEADER, row, strict=True)) for row in cells if len(row) == len(HEADER)]


def one(told: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert told.returncode == 0, told.stderr
    (row,) = table(told.stdout)
    return row


def waiting(run: Path) -> None:
    made_up.submitted(run, "7")


def training(run: Path) -> None:
    made_up.attempt(run, 0, None, job="7")
    made_up.rows(run, range(1, 41))
    made_up.lease(run, "7")


def silent(run: Path) -> None:
    made_up.attempt(run, 0, None, job="7")
    made_up.rows(run, range(1, 41), age_s=900.0)
    made_up.lease(run, "7")


def begun(run: Path) -> None:
    made_up.attempt(run, 0, None, job="7")
    made_up.lease(run, "7")


def requeued(run: Path) -> None:
    made_up.attempt(run, 0, STOPPED, job="7")
    made_up.rows(run, range(1, 41))
    made_up.checkpoint(run, 40)


def a_life_later(run: Path) -> None:
    requeued(run)
    made_up.lease(run, "7", attempt=1)


def resumed(run: Path) -> None:
    a_life_later(run)
    made_up.attempt(run, 1, None, job="7", start_step=40)


def in_place(run: Path) -> None:
    made_up.attempt(run, 0, RANK_DIED, job="7")
    made_up.rows(run, range(1, 41))
    made_up.lease(run, "7")


def asked_to_stop(run: Path) -> None:
    training(run)
    (run / "STOP").touch()


def over(run: Path) -> None:
    made_up.attempt(run, 0, FINISHED, job="7")
    made_up.rows(run, range(990, 1001))


def over_by_hand(run: Path) -> None:
    made_up.attempt(run, 0, STOPPED_BY_HAND, job="7")


def newly_submitted(run: Path) -> None:
    over_by_hand(run)
    made_up.submitted(run, "8")


def given_up(run: Path) -> None:
    in_place(run)
    made_up.outcome(run, "7", 0, "failed", "SIGKILL", age_s=50.0)
    made_up.outcome(run, "7", 1, "failed", "giving_up")


def lost_its_node(run: Path) -> None:
    training(run)
    made_up.outcome(run, "7", 0, "failed", "node_lost")


def begun_after_a_life(run: Path) -> None:
    training(run)
    made_up.outcome(run, "7", 0, "failed", "node_lost", age_s=500.0, attempt=-1)


QUEUED, RUNNING = in_queue("7", "PENDING", "Priority"), in_queue("7")
LOST = "7|NODE_FAIL|1795350417|1795350516|node[1-2]|1:0\n"
REFUSED = "8|FAILED|1795350417|1795350516|node1|2:0\n"


@pytest.mark.parametrize(
    ("make", "answers", "state"),
    [
        (waiting, {"squeue": QUEUED}, "pending (Priority)"),
        (waiting, {"squeue": RUNNING}, "starting"),
        (begun, {"squeue": RUNNING}, "starting"),
        (training, {"squeue": RUNNING}, "running"),
        (silent, {"squeue": RUNNING}, "no step for 15 min"),
        (asked_to_stop, {"squeue": RUNNING}, "stopping"),
        (in_place, {"squeue": RUNNING}, "restarting"),
        (training, {"squeue": in_queue("7", "COMPLETING")}, "completing"),
        (requeued, {"squeue": in_queue("7", "PENDING", "BeginTime")}, "pending (BeginTime)"),
        (requeued, {"squeue": RUNNING}, "starting"),
        (a_life_later, {"squeue": RUNNING}, "starting"),
        (resumed, {"squeue": RUNNING}, "starting"),
        (over, {}, "finished"),
        (over_by_hand, {}, "stopped (stop_file)"),
        (requeued, {}, "stopped (warning)"),
        (newly_submitted, {"sacct": REFUSED}, "failed (exit code 2)"),
        (training, {"sacct": LOST}, "node_fail (exit code 1)"),
        (training, {}, "died"),
        (waiting, {}, "never began"),
        (given_up, {"sacct": LOST}, "failed (giving_up)"),
        (lost_its_node, {"sacct": LOST}, "failed (node_lost)"),
        (begun_after_a_life, {"sacct": LOST}, "node_fail (exit code 1)"),
        (training, {"squeue": "!squeue: error: Unable to contact slurm controller"}, "held by node1"),
    ],
)
def test_the_state(make: Callable[[Path], None], answers: dict[str, str], state: str, tmp_path: Path) -> None:
    make(tmp_path / "runs/r")
    assert one(verb(tmp_path, "status", **(SLURM | answers)))["state"] == state


def test_a_row(tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    made_up.attempt(run, 0, STOPPED, job="7")
    made_up.attempt(run, 1, None, job="7", start_step=40)
    made_up.rows(run, range(1, 61))
    made_up.rows(run, range(41, 51), number=1)
    made_up.checkpoint(run, 40, age_s=185)
    made_up.lease(run, "7", attempt=1)
    row = one(verb(tmp_path, "status", **SLURM | {"squeue": RUNNING}))
    assert row == {
        "run": "runs/r",
        "job": "7",
        "state": "running",
        "nodes": "2",
        "step": "50/1000",
        "loss": "2.9500",
        "tokens/s": "81.2 k",
        "left": "31:40",  # 950 steps of 2 s
        "job left": "10:00",
        "restarts": "1: warning",
        "checkpoint": "40, 3 min ago",
    }


def test_one_run_with_all_its_lives(tmp_path: Path) -> None:
    run = tmp_path / "r"
    made_up.attempt(run, 0, STOPPED, job="7")
    made_up.attempt(run, 1, None, job="7", start_step=40)  # its node died, and it could say no end
    hosts = [f"n{i}" for i in range(8)]
    made_up.attempt(run, 2, None, job="7", start_step=40, hosts=hosts, time_s=time.time())
    made_up.lease(run, "7", attempt=2)
    made_up.outcome(run, "7", 1, "failed", "node_lost", age_s=50.0, attempt=1)
    lives = "".join(
        f"7|{state}|1795350417|{end}|node[1-2]|0:0\n"
        for state, end in (("REQUEUED", 1795350516), ("NODE_FAIL", 1795350600), ("RUNNING", "Unknown"))
    )
    done = verb(tmp_path, "status", "r", **SLURM | {"squeue": RUNNING, "sacct": lives})
    attempts, jobs = (part.splitlines()[1:] for part in done.stdout.split("\n\n")[1:])
    assert [line.split()[-2:] for line in attempts] == [["stopped", "warning"], ["died", "node_lost"], ["-", "-"]]
    assert "n0, n1, n2, n3 and 4 more" in attempts[2]
    assert [line.split()[1] for line in jobs] == ["requeued", "node_fail", "running"]


# ---- without Slurm, without accounting, others' jobs -----------------------------------------------------------------


def test_a_run_of_this_machine_needs_no_slurm(tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    made_up.attempt(run, 0, None)
    made_up.rows(run, range(1, 41))
    made_up.lease(run, **(_self_description("here", 0) | {"job": None}))
    done = verb(tmp_path, "status")
    assert one(done)["state"] == "running"
    assert len(done.stdout.splitlines()) == 2  # no word on Slurm
    (run / "LEASE").unlink()
    assert one(verb(tmp_path, "status"))["state"] == "died"


def test_jobs_without_slurm_are_told_apart_from_the_dead(tmp_path: Path) -> None:
    training(tmp_path / "runs/r")
    done = verb(tmp_path, "status")
    assert one(done)["state"] == "held by node1"
    assert "Slurm was not heard" in done.stdout.splitlines()[-1]


def test_without_accounting_the_controller_is_asked(tmp_path: Path) -> None:
    training(tmp_path / "runs/r")
    job = "JobId=7 JobName=a b UserId=me(1) JobState=NODE_FAIL ExitCode=0:0 StartTime=2026-11-22T12:26:57 NodeList=n1\n"
    answers = SLURM | {"sacct": "!Slurm accounting storage is disabled", "scontrol": job}
    done = verb(tmp_path, "status", **answers)
    assert one(done)["state"] == "node_fail"
    assert "no accounting (sacct: Slurm accounting storage is disabled)" in done.stdout


def test_a_shared_folder_holds_jobs_of_others(tmp_path: Path) -> None:
    training(tmp_path / "runs/r")
    with patch("slurm.look.queue.mine", return_value=queue.Queue()):
        done = verb(tmp_path, "status", **SLURM | {"squeue": RUNNING})
    assert one(done)["state"] == "running"


def test_a_job_of_mine_is_found_wherever_its_folder_lies(tmp_path: Path) -> None:
    training(tmp_path / "far" / "r")
    here = tmp_path / "here"
    here.mkdir()
    line = in_queue("7", folder=tmp_path / "far" / "r")
    assert one(verb(here, "status", **SLURM | {"squeue": line}))["run"] == str(tmp_path / "far" / "r")
    by_number = SLURM | {"squeue": line, "scontrol": f"JobId=7 StdOut={tmp_path}/far/r/slurm/7_0_log.out Power=\n"}
    assert one(verb(here, "status", "7", **by_number))["state"] == "running"


def test_the_runs_of_an_array(tmp_path: Path) -> None:
    """They lie in one folder; the first is over, the second trains."""
    array = tmp_path / "runs/lr"
    (array / "slurm").mkdir(parents=True)
    for task, raw, end in ((0, "7", FINISHED), (1, "8", None)):
        environment = {"SLURM_JOB_ID": raw, "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": str(task)}
        made_up.attempt(array / f"lr={task}", 0, end, environment=environment)
        made_up.rows(array / f"lr={task}", range(1, 41))
        made_up.submitted(array / f"lr={task}", f"8_{task}")
        (array / f"slurm/8_{task}_0_log.out").write_text(f"task {task}\n")
    made_up.lease(array / "lr=1", "8")
    answers = SLURM | {"squeue": in_queue("8_1", folder=array).replace("8_1|8_1|", "8_1|8|")}
    answers |= {
        "sacct": "8_0|COMPLETED|1|2|node1|0:0\n",
        "scontrol": f"JobId=8 StdOut={array}/slurm/8_1_0_log.out Power=\n",
    }
    for words in ((), ("runs",), ("runs/lr",), ("8",)):
        rows = table(verb(tmp_path, "status", *words, **answers).stdout)
        told = [(row["run"], row["job"], row["state"]) for row in rows]
        assert told == [("runs/lr/lr=1", "8_1", "running"), ("runs/lr/lr=0", "8_0", "finished")], words
    assert one(verb(tmp_path, "status", "8_1", **answers))["run"] == "runs/lr/lr=1"
    assert verb(tmp_path, "logs", "8_1", **answers).stdout == "task 1\n"
    assert verb(tmp_path, "logs", "runs/lr/lr=0", **answers).stdout == "task 0\n"
    assert verb(tmp_path, "cancel", "8", **answers).stdout == "job 8 is cancelled\n"


# ---- mistakes and odd folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "nothing: No such file or directory"),
        (["empty"], "empty: neither a run folder nor a folder of runs"),
        (["12"], "job 12: its run folder is not known here; name the folder"),
        (["file"], "file: Not a directory"),
    ],
)
@pytest.mark.parametrize("name", ["status", "watch", "logs", "stop", "cancel"])
def test_a_mistake_is_one_line(name: str, words: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    done = verb(tmp_path, name, *words, **SLURM)
    if name == "cancel" and words == ["12"]:
        told = "job 12 is not in the queue"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")


def test_a_folder_of_another_version(tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    made_up.attempt(run, 0, None, job="7", hosts={"node1": 8}, last_step="all", environment=["SLURM_JOB_ID=7"])
    made_up.rows(run, range(1, 5), loss={"total": 3.0}, lm_loss=3.0)
    made_up.write(run / "attempts/000/end.json", {"outcome": "finished", "version": 2})
    row = one(verb(tmp_path, "status", **SLURM))
    assert (row["state"], row["nodes"], row["step"], row["loss"], row["restarts"]) == ("died", "-", "0", "-", "0")


def test_a_clock_that_is_ahead_is_told(tmp_path: Path) -> None:
    training(tmp_path / "runs/r")
    made_up.rows(tmp_path / "runs/r", range(41, 44), age_s=-300.0)
    done = verb(tmp_path, "status", **SLURM | {"squeue": RUNNING})
    assert one(done)["step"] == "43/1000"
    assert done.stdout.splitlines()[-1] == "a node's clock is 5 min ahead of the one here: ages are off by that"


def test_one_run_that_may_not_be_read_hides_no_other(tmp_path: Path) -> None:
    training(tmp_path / "runs/r")
    (tmp_path / "runs/s/attempts/000").mkdir(parents=True)
    (tmp_path / "runs/s/attempts/000/start.json").mkdir()
    done = verb(tmp_path, "status", **SLURM | {"squeue": RUNNING})
    assert done.returncode == 0
    assert [row["state"] for row in table(done.stdout)] == ["running", "died"]
    told = "passed over, as it cannot be read: attempts/000/start.json (it is a folder, not a file)"
    assert f"runs/s: {told}" in done.stdout


def test_nothing_to_show(tmp_path: Path) -> None:
    done = verb(tmp_path, "status", **SLURM | {"squeue": ""})
    assert (done.returncode, done.stdout) == (0, "no run below runs/, and no job of yours in the queue\n")
    assert verb(tmp_path, "watch", **SLURM | {"squeue": ""}).returncode == 0


# ---- live, and many --------------------------------------------------------------------------------------------------


def test_a_thousand_runs_in_two_seconds(tmp_path: Path) -> None:
    """Of the processor: there is nothing to wait for. A third of the runs lives, a third needs accounting, a third
    is over."""
    living: list[str] = []
    accounting: list[str] = []
    kinds: dict[int, Path] = {}
    for number, kind in enumerate(("over", "alive", "lost")):
        run = kinds[number] = tmp_path / kind
        made_up.attempt(run, 0, STOPPED)
        made_up.attempt(run, 1, FINISHED if kind == "over" else None, start_step=40)
        made_up.rows(run, range(1, 201))
        made_up.rows(run, range(201, 401), number=1)
        made_up.checkpoint(run, 200)
        made_up.checkpoint(run, 300)
    for number in range(1000):
        run = tmp_path / "runs" / f"run-{number:04d}"
        shutil.copytree(kinds[number % 3], run, copy_function=os.link)
        made_up.submitted(run, str(number))
        if number % 3:
            made_up.lease(run, str(number), attempt=1)
            living += [in_queue(str(number), folder=run)] if number % 3 == 1 else []
            accounting += [f"{number}|NODE_FAIL|1795350417|1795350516|node1|1:0"] if number % 3 == 2 else []
    answers = SLURM | {"squeue": "\n".join(living) + "\n", "sacct": "\n".join(accounting) + "\n"}
    env = commands(tmp_path / "bin", **answers) | {"PYTHONPATH": str(ROOT)}
    command, told = [sys.executable, "-m", "slurm", "status"], []

    def look() -> None:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        told.append(done.stdout)

    takes_at_most(2.0, look, tries=5)
    rows = table(told[0])
    assert [row["state"] for row in rows[:333]] == ["running"] * 333
    assert sorted(row["state"] for row in rows).count("node_fail (exit code 1)") == 333
    assert len(rows) == 1000
    asked = (tmp_path / "bin/asked").read_text().count("\n")
    assert asked == 3 * len(told)  # squeue, squeue for others' jobs, sacct
