"""`python -m slurm logs`, `stop` and `cancel`, on made-up run folders and stand-ins for Slurm's commands."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.look import logs
from tests import made_up
from tests.slurm.jobs import ROOT, wait_for
from tests.slurm.stand_ins import SLURM, commands, in_queue, verb
from trainer.life.attempts import End
from trainer.life.lease import _self_description

RANK_DIED = End("failed", 40, None, True, "SIGKILL")
RUNNING, QUEUED = in_queue("7"), in_queue("7", "PENDING", "Priority")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two attempts of job 7. The second one trains."""
    made_up.attempt(tmp_path / "runs/r", 0, RANK_DIED, job="7")
    made_up.attempt(tmp_path / "runs/r", 1, None, job="7")
    made_up.lease(tmp_path / "runs/r", "7", attempt=1)
    return tmp_path / "runs/r"


def output(run: Path, text: str = "what the job said\n") -> Path:
    made_up.submitted(run, "7")
    path = run / "slurm/7_0_log.out"
    path.write_text(text)
    return path


# ---- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["7", "runs/r", "runs"])
def test_the_output_of_the_job(word: str, run: Path, tmp_path: Path) -> None:
    output(run)
    assert verb(tmp_path, "logs", word, **SLURM).stdout == "what the job said\n"


def test_the_output_of_a_script_of_ones_own(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine\n")
    told = f"JobId=7 Command=/x StdErr=/x StdOut={tmp_path}/mine.txt Power=\n"
    assert verb(tmp_path, "logs", "7", **SLURM | {"scontrol": told}).stdout == "mine\n"


def test_the_logs_of_ranks(run: Path, tmp_path: Path) -> None:
    output(run)
    assert verb(tmp_path, "logs", "runs/r", "--rank=0", **SLURM).stdout == "rank 0 of attempt 1\n"
    assert verb(tmp_path, "logs", "runs/r", "--attempt=0", **SLURM).stdout == "rank 0 of attempt 0\n"
    (run / "slurm/7_0_log.out").unlink()
    assert verb(tmp_path, "logs", "runs/r", **SLURM).stdout == "rank 0 of attempt 1\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rank=3"], "runs/r/attempts/001: no log of rank 3 (there are 1)"),
        (["--attempt=5"], "runs/r: there is no attempt 5 (there are 0 to 1)"),
    ],
)
def test_a_log_that_is_not_there(words: list[str], told: str, run: Path, tmp_path: Path) -> None:
    done = verb(tmp_path, "logs", "runs/r", *words, **SLURM)
    assert (done.returncode, done.stderr) == (2, f"error: {told}\n")


def test_no_log_yet(tmp_path: Path) -> None:
    made_up.submitted(tmp_path / "r", "7")
    assert "no attempt has begun yet" in verb(tmp_path, "logs", "r", **SLURM).stderr


def test_several_runs_have_no_one_log(run: Path, tmp_path: Path) -> None:
    made_up.attempt(tmp_path / "runs/s", 0, None)
    assert verb(tmp_path, "logs", "runs", **SLURM).stderr == "error: runs: holds 2 runs; name one, such as runs/r\n"


def test_a_follower_sees_the_next_attempt_and_the_end(tmp_path: Path) -> None:
    run = tmp_path / "r"
    log = made_up.attempt(run, 0, None) / "rank-00000.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    made_up.lease(run, **(_self_description("here", 0) | {"job": None}))  # this test plays the launcher
    env = {"PATH": "", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "told", "w+") as told:
        process = subprocess.Popen([sys.executable, "-m", "slurm", "logs", "-f", str(run)], env=env, stdout=told)
        wait_for("the last lines", lambda: "line 99" in (tmp_path / "told").read_text(), 20)
        with open(log, "a") as more:
            more.write("one more\n")
        wait_for("what comes", lambda: "one more" in (tmp_path / "told").read_text(), 20)
        made_up.attempt(run, 1, None)
        wait_for("the next attempt", lambda: "rank 0 of attempt 1" in (tmp_path / "told").read_text(), 20)
        (run / "LEASE").unlink()
        assert process.wait(20) == 0
    lines = (tmp_path / "told").read_text().splitlines()
    assert lines[0] == "line 80"  # not from the beginning
    assert lines[20:] == ["one more", f"==> {run}/attempts/001/rank-00000.log <==", "rank 0 of attempt 1"]


def test_a_reader_that_leaves_is_no_error(run: Path, tmp_path: Path) -> None:
    output(run, "x" * 10_000_000)
    env = commands(tmp_path / "bin", **SLURM) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "slurm", "logs", "runs/r"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(20) == 128 + signal.SIGPIPE


def test_a_follower_asks_slurm_seldom(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it reads the file: questions burden the controller."""
    output(run)
    monkeypatch.setattr(logs, "_POLL_S", 0.01)
    monkeypatch.setattr(logs, "_ASK_EVERY_S", 0.3)
    asked = tmp_path / "asked"
    commands(tmp_path / "bin", **SLURM)
    squeue = f'#!/bin/sh\necho >> {asked}; [ $(/usr/bin/wc -l < {asked}) -gt 3 ] || echo "{RUNNING}"\n'
    answers = {name: answer for name, answer in SLURM.items() if name != "squeue"}
    (tmp_path / "bin/squeue").write_text(squeue)
    (tmp_path / "bin/squeue").chmod(0o755)
    began = time.monotonic()
    assert verb(tmp_path, "logs", "-f", "runs/r", **answers).stdout == "what the job said\n"
    assert len(asked.read_text()) == 4
    assert time.monotonic() - began > 4 * 0.3


# ---- stop and cancel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["7", "runs/r"])
def test_stop_asks_by_the_run_folder(word: str, run: Path, tmp_path: Path) -> None:
    done = verb(tmp_path, "stop", word, **SLURM | {"squeue": RUNNING})
    assert done.returncode == 0, done.stderr
    assert (run / "STOP").exists()
    assert "saves and ends within two steps" in done.stdout


def test_stop_of_a_waiting_job_says_what_it_comes_to(run: Path, tmp_path: Path) -> None:
    done = verb(tmp_path, "stop", "7", **SLURM | {"squeue": QUEUED})
    assert (run / "STOP").exists()
    assert "python -m slurm cancel 7" in done.stdout


@pytest.mark.parametrize("word", ["7", "runs/r"])
def test_a_run_that_is_over_is_not_asked_to_stop(word: str, run: Path, tmp_path: Path) -> None:
    """A STOP file that stays would end the next start."""
    done = verb(tmp_path, "stop", word, **SLURM)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "does not run" in done.stderr
    assert not (run / "STOP").exists()


def test_a_run_of_another_node_may_be_asked_where_slurm_is_silent(run: Path, tmp_path: Path) -> None:
    answers = SLURM | {"squeue": "!squeue: error: Unable to contact slurm controller"}
    assert verb(tmp_path, "stop", "runs/r", **answers).returncode == 0
    assert (run / "STOP").exists()


def test_a_plain_run_is_stopped_but_has_nothing_to_cancel(tmp_path: Path) -> None:
    run = tmp_path / "r"
    made_up.attempt(run, 0, None)
    made_up.lease(run, **(_self_description("here", 0) | {"job": None}))
    done = verb(tmp_path, "cancel", "r")
    assert (done.returncode, done.stderr) == (
        2,
        "error: r runs without a job of Slurm's; to end it: python -m slurm stop r\n",
    )
    assert verb(tmp_path, "stop", "r").returncode == 0
    assert (run / "STOP").exists()


@pytest.mark.parametrize("word", ["7", "runs/r"])
def test_cancel(word: str, run: Path, tmp_path: Path) -> None:
    done = verb(tmp_path, "cancel", word, **SLURM | {"squeue": QUEUED})
    assert (done.returncode, done.stdout) == (0, "job 7 is cancelled\n")
    assert (tmp_path / "bin/asked").read_text().splitlines()[-1].endswith("/scancel 7")
    assert verb(tmp_path, "cancel", word, **SLURM).returncode == 2


def test_cancel_where_slurm_is_silent(run: Path, tmp_path: Path) -> None:
    for word in ("7", "runs/r"):
        done = verb(tmp_path, "cancel", word, **SLURM | {"squeue": "!squeue: error: no route"})
        assert (done.returncode, done.stderr) == (2, "error: Slurm does not answer: squeue: error: no route\n")
