"""Jobs on the rehearsal cluster, as a person submits them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm.rehearsal.cluster import Cluster
from tests.machine import patience

ROOT = Path(__file__).resolve().parents[2]


def environment(cluster: Cluster, **own: str) -> dict[str, str]:
    """A person's environment, after reading the cluster's env file."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MUSTER_", "SLURM_", "TORCHELASTIC_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**clean, "PATH": path, "OMP_NUM_THREADS": "1", "SLURM_CONF": str(cluster.home.conf), **own}


def call(cluster: Cluster, *command: str) -> str:
    """What a client prints; a failure shows all of it."""
    limit_s = patience(120.0)
    done = subprocess.run(
        command,
        env=environment(cluster),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def submit(cluster: Cluster, *words: str) -> str:
    """Submit a script; returns the job's id."""
    return call(cluster, "sbatch", "--parsable", *words).strip()


def job_state(cluster: Cluster, job: str) -> str:
    """The state that the controller has. It forgets a job after minutes."""
    shown = call(cluster, "scontrol", "--oneliner", "show", "job", job)
    return next(word.partition("=")[2] for word in shown.split() if word.startswith("JobState="))


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience(timeout_s)
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.2)


def wait_for_end(cluster: Cluster, job: str, output: Path, timeout_s: float = 200.0) -> str:
    """The state in which the job ended."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
    try:
        wait_for("end of the job", lambda: job_state(cluster, job) in over, timeout_s)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output.read_text() if output.exists() else 'no output'}") from None
    return job_state(cluster, job)
