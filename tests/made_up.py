"""Run folders in the state in which runs leave them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.life.attempts import End, numbers
from trainer.life.entries import checkpoint_name
from trainer.life.folder import RunFolder


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data) + "\n")


def attempt(
    root: Path, number: int, end: End | None, job: str | None = None, start_step: int = 0, **facts: Any
) -> Path:
    """Write the start of an attempt on two hosts, and its end if it has one."""
    place = RunFolder(root).attempts / f"{number:03d}"
    place.mkdir(parents=True)
    environment = {"SLURM_JOB_ID": job} if job is not None else {}
    start = {"time_s": time.time() - 100, "start_step": start_step, "last_step": 1000, "hosts": ["node1", "node2"]}
    write(place / "start.json", start | {"environment": environment} | facts)
    if end is not None:
        ended(root, number, end)
    (place / "rank-00000.log").write_text(f"rank 0 of attempt {number}\n")
    return place


def ended(root: Path, number: int, end: End) -> None:
    """Write the end of an attempt that has begun."""
    write(RunFolder(root).attempts / f"{number:03d}" / "end.json", asdict(end) | {"time_s": time.time()})


def rows(root: Path, steps: range, number: int = 0, age_s: float = 1.0, **facts: Any) -> None:
    """Write rows of metrics.jsonl. The last row is `age_s` old."""
    root.mkdir(parents=True, exist_ok=True)
    told = {"step_s": 2.0, "tokens_per_s": 81234.5, "lr": 1e-3, "grad_norm": 1.0, "mfu": None, **facts}
    with open(RunFolder(root).metrics, "a", encoding="utf-8") as file:
        for step in steps:
            time_s = time.time() - age_s - 2.0 * (steps[-1] - step)
            file.write(json.dumps({"time_s": time_s, "attempt": number, "step": step, "loss": 3 - step / 1000, **told}))
            file.write("\n")
    os.utime(RunFolder(root).metrics, (time.time() - age_s,) * 2)


def checkpoint(root: Path, step: int, age_s: float = 60.0) -> None:
    place = RunFolder(root).checkpoints / checkpoint_name(step)
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    os.utime(place / "manifest.json", (time.time() - age_s,) * 2)


def lease(root: Path, job: str | None = None, attempt: int = 0, **facts: Any) -> None:
    """Write the lease of a launcher on another node."""
    told = {"token": "t", "node": "node1", "pid": 7, "started_s": 1.0, "boot_id": "b", "pid_namespace": "p"}
    write(RunFolder(root).lease, told | {"job": job, "life": "0", "step": "0", "attempt": attempt} | facts)


def submitted(root: Path, job: str) -> None:
    (root / "slurm").mkdir(parents=True, exist_ok=True)
    write(root / "slurm/job.json", {"job": job, "time_s": time.time(), "user": "me"})


def outcome(
    root: Path, job: str, life: int, reason: str, cause: str | None, age_s: float = 0.0, attempt: int | None = None
) -> None:
    """Write what `slurm after` writes about a life of a job. `attempt`: the newest then; default: now."""
    place = root / f"slurm/lives/{job}-{life}"
    place.mkdir(parents=True)
    newest = max(numbers(RunFolder(root)), default=-1) if attempt is None else attempt
    told = {
        "job": job,
        "life": life,
        "attempt": newest,
        "reason": reason,
        "cause": cause,
        "step": 40,
        "exit_code": 1,
        "again": None,
    }
    write(place / "outcome.json", told | {"failed_nodes": [], "time_s": time.time() - age_s})


_GPU = {
    "gpu_pct": 99,
    "tensor_pct": 44.0,
    "memory_gib": 61.25,
    "power_w": 640.5,
    "temperature_c": 61,
    "sm_clock_mhz": 1755,
}


def second(node: int, gpus: int, age_s: float, **changes: Any) -> dict[str, Any]:
    """A node's row of gpu/<node>.jsonl. Its last GPU has the changes."""
    devices = [{"uuid": f"GPU-{node}-{n}", "index": n, "sm_pct": 90.0, **_GPU, "throttled": []} for n in range(gpus)]
    devices[-1] |= changes
    ranks = [{"rank": gpus * node + n, "step": 40, "phase": "computing", "still_s": 0.1} for n in range(gpus)]
    host = {"cpu_pct": 31.0}
    return {
        "kind": "second",
        "time_s": time.time() - age_s,
        "attempt": 0,
        "host": host,
        "gpus": devices,
        "ranks": ranks,
    }
