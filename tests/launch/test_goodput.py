"""Goodput from the folder alone: every second is in one class, and the classes add up to the clock time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.look.goodput import CLASSES, goodput
from launch.look.report import lines
from launch.look.report import main as report
from tests.distributed import scratch, write_config
from tests.life.runs import LAUNCH, running
from trainer.life.events import append_row
from trainer.life.folder import RunFolder, write_json
from trainer.life.heartbeat import Phase


class MadeUp:
    """A run folder as the trainer and the launcher write it, with its own clock."""

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root)
        self.folder.attempts.mkdir(parents=True)
        self.folder.events.mkdir()
        self.number = -1
        self.clock_s = 1_000_000.5

    def attempt(self, launched_s: float, step: int, before_s: float = 2.0, job: str | None = None) -> None:
        """An attempt that begins after `before_s` of imports."""
        self.number += 1
        self.phases: dict[str, float] = {}
        self.clock_s += before_s
        environment = {"MUSTER_LAUNCHED": f"{launched_s:.3f}"} | ({"SLURM_JOB_ID": job} if job else {})
        (self.folder.attempts / f"{self.number:03d}").mkdir()
        facts = {"time_s": self.clock_s, "start_step": step, "world_size": 4, "environment": environment}
        write_json(self.path / "start.json", facts)

    @property
    def path(self) -> Path:
        return self.folder.attempts / f"{self.number:03d}"

    def spend(self, phase: Phase, seconds: float) -> None:
        self.phases[phase.word] = self.phases.get(phase.word, 0.0) + seconds
        self.clock_s += seconds

    def row(self, step: int) -> None:
        row = {"step": step, "loss": 5.0 - step / 100, "consumed_samples": 8 * step, "phases_s": dict(self.phases)}
        append_row(self.folder.metrics, {"time_s": self.clock_s, "attempt": self.number, **row})

    def tell(self, event: str, **facts: Any) -> None:
        path = self.folder.events / "a-launcher.jsonl"
        append_row(path, {"time_s": self.clock_s, "attempt": self.number, "event": event, **facts})

    def end(self, reason: str, requeue: bool = False) -> None:
        end = {"reason": reason, "step": 0, "checkpoint": None, "requeue": requeue, "time_s": self.clock_s}
        write_json(self.path / "end.json", end)


def steps(run: MadeUp, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.spend(Phase.WAITING_FOR_DATA, 0.25)
        run.spend(Phase.COMPUTING, 1.0)
        run.row(step)


@pytest.mark.parametrize("jump_s", [1.6e8, -1.6e8])
def test_a_clock_that_was_set_between_two_rows_takes_and_gives_no_time(jump_s: float, tmp_path: Path) -> None:
    """In a folder whose times are the time of day, as earlier versions wrote."""
    run = MadeUp(tmp_path / "run")
    run.clock_s = 1.7e9
    run.attempt(run.clock_s + 0.5, 0, before_s=2.5)
    run.spend(Phase.STARTING, 3.0)
    steps(run, 1, 5)
    run.clock_s += jump_s
    run.tell("clock_jumped", seconds=jump_s)
    steps(run, 6, 10)
    run.tell("ended", phases_s=run.phases)
    run.end("finished")
    found = goodput(run.folder)
    assert found.allocated_s == pytest.approx(2.0 + 3.0 + 10 * 1.25)
    assert found.seconds["starting"] == pytest.approx(2.0 + 3.0)
    assert found.clock_jumps == [(0, jump_s)]
    assert f"a clock was set by {jump_s:+,.0f} s in attempt 0; the times above are by another" in lines(found)


def test_what_is_made_again_is_redone(tmp_path: Path) -> None:
    run = MadeUp(tmp_path / "run")
    began = run.clock_s
    run.attempt(began, 0)
    run.spend(Phase.STARTING, 3.0)
    steps(run, 1, 10)
    run.clock_s += 4.0  # dead for a while before that is noticed
    run.tell("rank_died", rank=1, exit_code=-9)
    run.attempt(began, 6, before_s=1.0)  # from step 6 on
    run.spend(Phase.STARTING, 2.0)
    steps(run, 7, 10)
    run.spend(Phase.SAVING, 0.5)
    run.tell("ended", phases_s=run.phases)
    run.end("finished")
    found = goodput(run.folder)
    assert found.seconds["saving"] == pytest.approx(0.5)
    assert found.allocated_s == pytest.approx(run.clock_s - began, abs=1e-6)
    assert found.seconds["computing"] == pytest.approx(10.0)
    assert found.seconds["waiting_for_data"] == pytest.approx(2.5)
    assert found.seconds["redone"] == pytest.approx(4 * 1.25 + 4.0)
    assert found.seconds["starting"] == pytest.approx(2.0 + 3.0 + 1.0 + 2.0)
    assert (found.attempts, found.ranks, found.steps, found.samples) == (2, 4, 10, 80)
    assert found.gpu_hours == pytest.approx(4 * found.allocated_s / 3600)


def test_a_hang_is_stalled(tmp_path: Path) -> None:
    run = MadeUp(tmp_path / "run")
    began = run.clock_s
    run.attempt(began, 0)
    steps(run, 1, 4)
    run.clock_s += 60.0
    run.tell("hang", ranks=[{"rank": 0, "still_s": 58.0}])
    run.end("failed", requeue=True)
    found = goodput(run.folder)
    assert found.seconds["stalled"] == pytest.approx(58.0)
    assert found.seconds["redone"] == pytest.approx(2.0)
    assert found.allocated_s == pytest.approx(run.clock_s - began, abs=1e-6)


def test_time_in_the_queue(tmp_path: Path) -> None:
    run = MadeUp(tmp_path / "run")
    write_json_in(run.folder.root / "slurm" / "job.json", {"job": "7", "time_s": run.clock_s - 100.0})
    run.attempt(run.clock_s, 0, job="7")
    steps(run, 1, 2)
    run.end("stopped", requeue=True)
    run.clock_s += 50.0
    run.attempt(run.clock_s, 2, job="7")
    steps(run, 3, 4)
    run.end("stopped")
    run.clock_s += 10_000.0  # a person's pause: nothing waited and nothing was allocated
    run.attempt(run.clock_s, 4)
    steps(run, 5, 6)
    run.end("finished")
    found = goodput(run.folder)
    assert found.seconds["queued"] == pytest.approx(150.0)
    assert found.allocated_s < 200


def write_json_in(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True)
    write_json(path, data)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6), st.booleans()), min_size=1, max_size=5))
def test_classes_add_up_whatever_happens(attempts: list[tuple[int, int, bool]]) -> None:
    """For each attempt of one launcher: (steps made, how many of them are lost, whether it writes its end)."""
    with scratch() as root:
        run = MadeUp(root / "run")
        began, step = run.clock_s, 0
        for made, lost, says in attempts:
            run.attempt(began, step)
            run.spend(Phase.STARTING, 1.0)
            steps(run, step + 1, step + made)
            run.clock_s += 3.0
            run.tell("rank_died", rank=0, exit_code=-9)
            if says:
                run.end("failed")
            step = max(step + made - lost, 0)
        found = goodput(run.folder)
        assert found.allocated_s == pytest.approx(run.clock_s - began, abs=1e-6)
        assert min(found.seconds.values()) > -1e-6
        assert set(found.seconds) == set(CLASSES)


def test_a_row_cut_in_half_and_a_clock_that_jumps(tmp_path: Path) -> None:
    run = MadeUp(tmp_path / "run")
    run.attempt(run.clock_s, 0)
    steps(run, 1, 3)
    run.clock_s -= 3600.0
    steps(run, 4, 6)
    with open(run.folder.metrics, "a") as file:
        file.write('{"time_s": 1, "att')
    run.end("finished")
    assert goodput(run.folder).seconds["computing"] == pytest.approx(6.0)


def test_without_a_row_all_is_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = MadeUp(tmp_path / "run")
    run.attempt(run.clock_s, 0)
    run.end("failed")
    assert report([str(run.folder.root), "--json", str(tmp_path / "out.json")]) == 0
    assert "starting          100.0%" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["seconds"]["starting"] == pytest.approx(2.0)


@pytest.mark.full
def test_a_real_run_with_restarts_adds_up_to_the_wall_clock(tmp_path: Path) -> None:
    """A killed rank, then a stop, then a second command up to the end: within 1 % of what a watch beside it shows."""
    write_config(tmp_path, train__steps=100_000, train__global_batch=64, checkpoint__every_steps=4)
    wall_s, step = 0.0, 0
    for part in range(2):
        last = () if part == 0 else (f"train.steps={step + 40}",)
        began = time.time()
        with running(LAUNCH, tmp_path, *last) as run:
            if part == 0:
                run.wait_for("step 9", lambda: run.step() >= 9)
                run.workers()[1].kill()
                run.wait_for("another attempt", lambda: len(run.events("started")) == 2)
                run.wait_for("its steps", lambda: run.rows()[-1]["attempt"] == 1 and run.step() >= 14)
                run.folder.stop.touch()
            assert run.wait() == (3 if part == 0 else 0), run.output
            wall_s += time.time() - began
        step = run.end()["step"]
    found = goodput(run.folder)
    print("\n".join(lines(found)))
    assert found.allocated_s == pytest.approx(wall_s, rel=0.01)
    assert found.attempts == 3
    assert found.seconds["redone"] > 0
    assert found.steps == step
    assert all(len(line) <= 80 for line in lines(found))
