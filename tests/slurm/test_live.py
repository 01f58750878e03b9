"""`python -m slurm watch`, on made-up run folders and stand-ins for Slurm's commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import made_up
from tests.slurm.jobs import ROOT
from tests.slurm.stand_ins import SLURM, commands, in_queue, verb
from trainer.life.attempts import End
from trainer.life.events import append_row

RUNNING = in_queue("7")


def training(run: Path) -> None:
    made_up.attempt(run, 0, None, job="7")
    made_up.rows(run, range(1, 41))
    made_up.lease(run, "7")


def test_watch_ends_when_no_run_lives(tmp_path: Path) -> None:
    training(tmp_path / "runs/r")
    bin_ = tmp_path / "bin"
    commands(bin_, **SLURM)
    (bin_ / "squeue").write_text(f'#!/bin/sh\n[ -e {tmp_path}/over ] || echo "{RUNNING}"\n')
    env = {"PATH": str(bin_), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "slurm", "watch", "--every", "0.2"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[2].split()[1:3] == ["7", "running"]
        made_up.ended(tmp_path / "runs/r", 0, End("finished", 1000, None, False))
        (tmp_path / "over").touch()
        rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert rest.splitlines()[-2].split()[1:3] == ["7", "finished"]


def test_watch_of_one_run_is_the_picture_of_launch_watch(tmp_path: Path) -> None:
    training(tmp_path / "runs/r")
    for number in range(2):
        path = tmp_path / f"runs/r/gpu/node{number + 1}.jsonl"
        path.parent.mkdir(exist_ok=True)
        append_row(path, made_up.second(number, 2, age_s=0.5))
    end = {"reason": "finished", "step": 1000, "checkpoint": None, "requeue": False, "cause": None}
    made_up.write(tmp_path / "runs/r/attempts/000/end.json", end)
    there = verb(tmp_path, "watch", "runs/r", **SLURM | {"squeue": ""}).stdout.splitlines()
    command = [sys.executable, "-m", "launch", "watch", "--once", "runs/r"]
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=60)
    here = done.stdout.splitlines()
    assert there[0] == "r  attempt 0  job 7  finished"
    assert here[0] == "r  attempt 0  finished"
    assert [line[:8] for line in here[3:7]] == ["node1 G0", "node1 G1", "node2 G0", "node2 G1"]
    assert there[2:7] == here[2:7]
