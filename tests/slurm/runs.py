"""A submitted run that meets a fault, and the questions about it afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch.look.run_folder import Outcome, outcomes
from slurm.job.lives import lives_of
from slurm.rehearsal.cluster import Cluster
from tests.distributed import tiny
from tests.slurm.jobs import ROOT, call, environment, job_state, wait_for
from trainer.life.events import read_events
from trainer.life.folder import RunFolder, write_text
from trainer.life.rows import read_json, read_rows

STEPS = 20
EVERY = 5  # steps between checkpoints
STEP_S = 0.4  # seconds that each step waits
SLOW = Path(__file__).parent / "slow"


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny(folder, **{"train__steps": STEPS, "checkpoint__every_steps": EVERY, **changes})


def losses(folder: RunFolder) -> dict[int, tuple[float, float]]:
    """Step -> losses. Rows of a later attempt win."""
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_rows(folder.metrics)}


class Rehearsed:
    """A run on two nodes of two ranks each, submitted as a person does."""

    def __init__(
        self, cluster: Cluster, place: Path, *words: str, commit_s: float = 0, tree: Path = ROOT, **changes: Any
    ) -> None:
        self.cluster, self.folder, self.place = cluster, RunFolder(place / "run"), place
        self.config = place / "config.yaml"
        self.config.write_text(yaml.safe_dump(config_of(place, **changes)))
        self.wait_in_steps(STEP_S, commit_s)
        self.job = self.submit("--nodes=2", *words, tree=tree)

    def wait_in_steps(self, step_s: float, commit_s: float = 0) -> None:
        """From now on each step, and each commit, waits this long."""
        write_text(self.place / "slow", f"{step_s} {commit_s}")

    def submit(self, *words: str, tree: Path = ROOT) -> str:
        """Submit the code of `tree`; returns the job's number."""
        setup = f"slurm.setup=[export SLOW={self.place}/slow PYTHONPATH={SLOW}]"
        request = ["--gpus-per-node=2", "--cpus-per-task=2", "--warning-s=60", setup, *words]
        done = subprocess.run(
            [sys.executable, "-m", "slurm", "submit", str(self.config), *request],
            **{"env": environment(self.cluster, XDG_CONFIG_HOME=str(self.place)), "cwd": tree},
            **{"capture_output": True, "text": True, "timeout": 60, "check": False},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1]

    # ---- what it does now -------------------------------------------------------------------------------------------

    @property
    def output(self) -> str:
        log = self.folder.root / f"slurm/{self.job}_0_log.out"
        return log.read_text() if log.exists() else "no output"

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder.metrics)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder) if event["event"] == name]

    def wait(self, what: str, condition: Callable[[], Any], timeout_s: float = 90.0) -> None:
        try:
            wait_for(what, condition, timeout_s)
        except AssertionError as error:
            shown = call(self.cluster, "scontrol", "show", "job", self.job)
            raise AssertionError(f"{error}\n{self.output}\n{shown}") from None

    def wait_for_step(self, step: int, attempt: int = 0, timeout_s: float = 90.0) -> None:
        reached = lambda: any(r["step"] >= step and r["attempt"] >= attempt for r in self.rows()[-1:])  # noqa: E731
        self.wait(f"step {step} of attempt {attempt}", reached, timeout_s)

    def wait_for_life(self, life: int, timeout_s: float = 120.0) -> None:
        """Wait until this life of the job trains."""
        self.wait(f"life {life}", lambda: any(start["life"] == life for start in self.starts()), timeout_s)

    def starts(self) -> list[dict[str, Any]]:
        """Every attempt's start, with the life of the job that made it."""
        found = [read_json(path) for path in sorted(self.folder.attempts.glob("*/start.json"))]
        return [s | {"life": int(s["environment"].get("SLURM_RESTART_COUNT", "0"))} for s in found if s]

    def processes(self, kind: str) -> list[psutil.Process]:
        """`trainer`, `launch.run.agent` or `slurm` processes of this run on all nodes: this process sees them all."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                ours = any(word.startswith(str(self.folder.root / "slurm")) for word in words)
                rank = "RANK" in process.environ()
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found += {
                        "rank": [process] if rank else [],
                        "agent": [process] if "launch.run.agent" in words else [],
                        "supervisor": [process] if words[1:4] == ["-m", "slurm", "job"] else [],
                    }[kind]
            except (psutil.Error, OSError):
                continue
        return found

    def come_near_the_time_limit(self) -> None:
        """Set the limit so that Slurm, which looks every 30 s, sends the warning at its next look."""
        minutes = int(time.time() - starts(self.cluster, self.job) + 20) // 60 + 1
        call(self.cluster, "scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")

    def lift_time_limit(self) -> None:
        """Lift the limit of a requeued job, before it meets the limit again."""
        self.wait("end of the life", lambda: job_state(self.cluster, self.job) in ("PENDING", "RUNNING"))
        call(self.cluster, "scontrol", "update", f"JobId={self.job}", "TimeLimit=60")

    def kill_rank(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        victim = next(p for p in self.processes("rank") if p.environ()["RANK"] == str(rank))
        victim.send_signal(number)

    def process(self, kind: str, node: str) -> psutil.Process:
        return next(p for p in self.processes(kind) if p.environ().get("SLURMD_NODENAME") == node)

    # ---- what came of it --------------------------------------------------------------------------------------------

    def lives(self) -> list[Outcome]:
        return list(outcomes(self.folder))

    def finish(self, timeout_s: float = 240.0) -> list[Outcome]:
        """Let the run train without delays, and wait until it has ended. Returns how its lives ended."""
        ended = lambda: [o for o in self.lives() if o.again is None]  # noqa: E731
        began = len(self.starts())
        self.wait("end of the run", lambda: ended() or len(self.starts()) > began, timeout_s)
        self.wait_in_steps(0)
        self.wait("end of the run", ended, timeout_s)
        return self.lives()

    def assert_all_had_left(self) -> None:
        """Check that before each request for another life, each rank had saved and each node had left its last word."""
        asked = self.events("requeue_asked")
        assert asked
        for event in asked:
            life = lives_of(self.folder) / f"{event['job']}-{event['life']}"
            words = list(life.glob("node-*.json"))
            assert len(words) == 2
            assert max(word.stat().st_mtime for word in words) <= event["time_s"]
            ends = [e for e in self.events("ended") if e["time_s"] <= event["time_s"]]
            saves = [e for e in self.events("saved") if e["time_s"] <= event["time_s"]]
            assert saves[-1]["checkpoint"] == f"step-{ends[-1]['step']:08d}"

    def lost_steps(self) -> int:
        """How many steps were made twice, over all attempts."""
        return len(self.rows()) - len(losses(self.folder))

    def seconds_until_again(self, since_s: float) -> float:
        """Seconds from a fault to the first step of a new attempt."""
        first = self.attempt_at(since_s)
        return next(r["time_s"] for r in self.rows() if r["attempt"] > first) - since_s

    def attempt_at(self, time_s: float) -> int:
        return max((r["attempt"] for r in self.rows() if r["time_s"] <= time_s), default=-1)

    def own_share_s(self) -> float:
        """Seconds from an agreed end to the first step of the next life, without Slurm's own time."""
        asked = self.events("requeue_asked")[0]
        ended = max(e["time_s"] for e in self.events("ended") if e["time_s"] <= asked["time_s"])
        first = next(r["time_s"] for r in self.rows() if r["time_s"] > asked["time_s"])
        began = starts(self.cluster, self.job)
        return asked["time_s"] - ended + first - began


def starts(cluster: Cluster, job: str) -> float:
    """When Slurm started the last life of the job."""
    shown = dict(w.split("=", 1) for w in call(cluster, "scontrol", "-o", "show", "job", job).split() if "=" in w)
    return datetime.fromisoformat(shown["StartTime"]).timestamp()
