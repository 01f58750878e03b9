"""Look at a job on the rehearsal cluster, and stop it, as a person does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from slurm.rehearsal.cluster import Cluster
from tests.distributed import write_config
from tests.machine import patience
from tests.slurm.jobs import ROOT, call, environment, wait_for
from tests.slurm.stand_ins import commands
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json, read_rows


def slurm(cluster: Cluster, cwd: Path, *words: str, **own: str) -> str:
    """The output of our verb, typed in `cwd`."""
    env = environment(cluster, PYTHONPATH=str(ROOT), **own)
    command = [sys.executable, "-m", "slurm", *words]
    limit_s = patience(120.0)
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_is_looked_at_followed_and_stopped(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, train__steps=100000, checkpoint__every_steps=0)
    run, here = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    here.mkdir()
    request = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30"]
    job = slurm(cluster, here, "submit", str(config), *request).split()[1]
    env = environment(cluster, PYTHONPATH=str(ROOT))
    wait_for("rows", lambda: len(read_rows(run.metrics)) > 3)

    row = re.split(r"  +", slurm(cluster, here, "status").splitlines()[1])
    assert [row[0], row[1], row[2].split()[0], row[3]] == [str(run.root), job, "running", "2"]
    step, of = row[4].split("/")
    assert (4 <= int(step) <= len(read_rows(run.metrics)), of) == (True, "100000")
    follower = subprocess.Popen(
        [sys.executable, "-m", "slurm", "logs", "-f", job], env=env, cwd=here, stdout=subprocess.PIPE, text=True
    )
    watcher = subprocess.Popen(
        [sys.executable, "-m", "slurm", "watch", "--every=0.5", str(run.root)],
        env=env,
        cwd=here,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "saves and ends within two steps" in slurm(cluster, here, "stop", job)
    followed, watched = (one.communicate(timeout=patience(60.0))[0] for one in (follower, watcher))
    assert (follower.returncode, watcher.returncode) == (0, 0)
    end = read_json(run.attempts / "000/end.json")
    assert (end["reason"], end["cause"], end["requeue"]) == ("stopped", "stop_file", False)
    assert f"stopped at step {end['step']} (stop_file)" in followed
    assert "\x1b" not in followed  # one plain line per step, although srun gives the ranks a terminal
    assert f"run  attempt 0  job {job}  " in watched  # running, or already stopping
    assert "  stopped (stop_file)" in watched.rpartition("attempt 0")[2].splitlines()[0]
    assert {"node1 r0", "node2 r1"} <= {line[:8] for line in watched.splitlines()}

    for told in (slurm(cluster, here, "status", job), slurm(cluster, here, "status", str(run.root))):
        _, attempts, lives = (part.splitlines() for part in told.split("\n\n"))
        assert attempts[1].split()[0] == "0"
        assert attempts[1].split()[-6:] == ["node2", "0", "to", str(end["step"]), "stopped", "stop_file"]
        assert lives[1].split()[:2] == [job, "failed"]  # Slurm's word for exit code 3
    without = commands(tmp_path / "bin", sacct="!Slurm accounting storage is disabled")["PATH"]
    told = slurm(cluster, here, "status", job, PATH=f"{without}:{env['PATH']}")
    assert " stopped (stop_file)  " in told
    assert "earlier lives of the job are not known (sacct: Slurm accounting storage is disabled)" in told


def test_a_waiting_job_is_taken_out_of_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    later = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "slurm.sbatch={begin: now+1hour}"]
    job = slurm(cluster, tmp_path, "submit", str(config), *later).split()[1]
    row = slurm(cluster, tmp_path, "status", job).splitlines()[1]
    assert row.split()[1:4] == [job, "pending", "(BeginTime)"]
    assert slurm(cluster, tmp_path, "cancel", str(tmp_path / "run")) == f"job {job} is cancelled\n"
    wait_for("an empty queue", lambda: call(cluster, "squeue", "-h", "-j", job) == "", 30)
    assert " cancelled  " in slurm(cluster, tmp_path, "status", "run").splitlines()[1]
