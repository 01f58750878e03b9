"""The ways a run is started, as people type them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import free_port, tiny, train, write_config
from tests.engines import under_both
from tests.machine import patience
from tests.traps import fill
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json, read_rows

ROOT = Path(__file__).parent.parent
MUSTER = str(Path(sys.executable).with_name("muster"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def run(command: list[str], here: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    limit_s = patience(120.0)
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=env, cwd=here, check=False)


def finished(folder: Path, step: int) -> None:
    end = read_json(RunFolder(folder / "run").attempts / "000/end.json")
    assert (end["reason"], end["step"], end["checkpoint"]) == ("finished", step, f"step-{step:08d}")


@under_both
def test_torchrun_on_one_node(engine: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path, **engine)
    done = run([*TORCHRUN, "--nproc_per_node", "2", "-m", "trainer", str(config), "train.steps=4"])
    assert done.returncode == 0, done.stderr
    finished(tmp_path, 4)
    assert "finished at step 4" in done.stdout
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for key in ("loss", "target_tokens", "consumed_samples", "lr", "grad_norm", "step_s", "data_wait_s"):
        assert all(key in row for row in rows)
    assert rows[-1]["mfu"] is None  # no GPU with a known peak
    assert (tmp_path / "run/attempts/000/rank-00001.log").exists()


def job_script(config: Path, size: int, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """slurm/examples/one-node.sbatch as it stands, without Slurm: its directives are comments to bash."""
    script = (ROOT / "slurm/examples/one-node.sbatch").read_text()
    assert re.search(r"^torchrun .*--rdzv-endpoint=", script.replace("\\\n", ""), re.M)
    own = {"SLURM_JOB_ID": str(free_port()), "GPUS_PER_NODE": str(size), "OMP_NUM_THREADS": "1"}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return ["bash", "slurm/examples/one-node.sbatch", str(config), *overrides], own


@pytest.mark.full
def test_the_line_of_a_job_script(tmp_path: Path) -> None:
    command, environment = job_script(write_config(tmp_path), 2, "train.steps=4")
    done = run(command, **environment)
    assert done.returncode == 0, done.stderr
    finished(tmp_path, 4)


def test_a_job_script_passes_the_warning_on(tmp_path: Path) -> None:
    command, environment = job_script(write_config(tmp_path), 1, "train.steps=100000")
    given: dict[str, Any] = {"env": {**os.environ, **environment}, "cwd": ROOT, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **given, start_new_session=True) as script:
        try:
            deadline = time.monotonic() + patience(60.0)
            while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            script.send_signal(signal.SIGUSR2)
            assert script.wait(timeout=patience(60.0)) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)  # torchrun too, and its workers
    end = read_json(tmp_path / "run/attempts/000/end.json")
    assert (end["reason"], end["cause"], end["requeue"]) == ("stopped", "warning", True)
    assert end["checkpoint"] == f"step-{end['step']:08d}"


@under_both
def test_debug_in_one_process(engine: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path, freeze__frozen=["blocks.0.*"], train__steps=50, **engine)
    done = run([sys.executable, "-m", "trainer", str(config), "--debug"])
    assert done.returncode == 0, done.stderr
    assert "every check held" in done.stdout
    assert "finished at step 5;" in done.stdout  # reduced from 50
    assert not (tmp_path / "run").exists()


def test_muster_run_in_a_folder_of_other_things(tmp_path: Path) -> None:
    """Launcher, agent, workers and monitor import our packages and the real torch."""
    config, here = write_config(tmp_path), tmp_path / "here"
    here.mkdir()
    fill(here)
    done = run([MUSTER, "run", str(config), "--nproc", "1", "train.steps=4"], here)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [row for row in read_events(RunFolder(tmp_path / "run")) if row["event"] == "monitor_lost"]
    finished(tmp_path, 4)
    assert not (tmp_path / "run/LEASE").exists()


def test_finished_run_exits_0_again_and_does_nothing(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert train(config) == [0]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run/checkpoints").iterdir()}
    assert train(config) == [0]
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run/checkpoints").iterdir()} == before
