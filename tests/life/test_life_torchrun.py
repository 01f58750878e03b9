"""The same life under bare torchrun, and in one process: exit codes, and what is saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.config import Config
from tests.distributed import run_ranks, tiny, write_config
from tests.engines import ENGINES, rows, under_both
from tests.life.phases import BY_NAME, PHASES, Phase
from tests.life.runs import (
    LAUNCH,
    PROCESS,
    TORCHRUN,
    Running,
    finish,
    finish_here,
    running,
    samples_are_consecutive,
)
from tests.life.test_life_stops import CAUSES, StopCause
from trainer.life.stop import StopWish
from trainer.start import start

UNDER_TORCHRUN = [cause for cause in CAUSES if cause.name in ("STOP file", "SIGINT", "SIGTERM")]
PROCESS_ONCE = [("preparation", "SIGINT", "fsdp")]


@pytest.mark.full  # in `make test` a job script's torchrun is warned: tests/test_ways.py
@pytest.mark.parametrize(("phase", "cause", "engine"), rows([], PHASES, UNDER_TORCHRUN, ENGINES), indirect=["engine"])
def test_stop_under_torchrun(
    phase: Phase, cause: StopCause, engine: dict[str, Any], tmp_path: Path, full: bool, note: Callable[..., None]
) -> None:
    """torchrun passes the signal on, gives the ranks 30 s to save, and exits 1 itself."""
    phase.write(tmp_path, endless=True, **engine)
    with running(TORCHRUN, tmp_path) as run:
        cause.bring_about(run, phase)
        code = run.wait()
        run.gone(within_s=5.0)
        seconds = time.time() - cause.since
    if phase.name == "start-up" and cause.name != "STOP file":  # no rank listens yet, so torchrun's signal ends them
        assert (code, len(run.attempts())) == (1, 1)
    else:
        assert code == (0 if cause.name == "STOP file" else 1), run.output
        stopped(run, phase, cause)
    resumed = goes_on(run, phase, tmp_path, TORCHRUN if full else None)
    note("torchrun", phase.name, cause.name, code, f"{seconds:.1f}", resumed)


@pytest.mark.parametrize(
    ("phase", "cause", "engine"), rows(PROCESS_ONCE, PHASES[1:], CAUSES, ENGINES), indirect=["engine"]
)
def test_stop_of_one_process(
    phase: Phase, cause: StopCause, engine: dict[str, Any], tmp_path: Path, full: bool, note: Callable[..., None]
) -> None:
    phase.write(tmp_path, endless=True, **engine, **cause.limit(phase))
    with running(PROCESS, tmp_path) as run:
        cause.bring_about(run, phase)
        code = run.wait()
        run.gone(within_s=0.5)
        seconds = cause.seconds(run)
    stopped(run, phase, cause)
    assert code == (0 if run.end()["reason"] == "finished" else cause.code), run.output
    resumed = goes_on(run, phase, tmp_path, PROCESS if full else None)
    note("one process", phase.name, cause.name, code, seconds, resumed)


def stopped(run: Running, phase: Phase, cause: StopCause) -> None:
    end = run.end()
    assert (end["step"], run.committed()) == (run.step(), run.step())
    assert not run.folder.lease.exists()
    assert not run.folder.stop.exists()
    if phase.name == "last step" and end["reason"] == "finished":  # asked for when the last step had begun
        assert end["step"] == phase.steps
        return
    assert (end["reason"], end["cause"], end["requeue"]) == ("stopped", cause.word, cause.code == 75)


def goes_on(run: Running, phase: Phase, folder: Path, way: tuple[str, ...] | None) -> int:
    """The next start continues from the right step and finishes. Returns that step."""
    attempts, step = len(run.attempts()), run.committed()
    phase.shorten(folder)
    last = step + 2
    after = (
        finish(way, folder, f"train.steps={last}", "train.time_limit_s=null")
        if way is not None
        else finish_here(folder, last)
    )
    assert after.start_step(attempts) == step
    assert after.end()["reason"] == "finished"
    samples_are_consecutive(after)
    return step


@pytest.mark.full
def test_killed_agent_of_torchrun_takes_its_ranks_along(engine: dict[str, Any], tmp_path: Path) -> None:
    phase = BY_NAME["step"]
    # a save would notice that the agent's store is gone
    phase.write(tmp_path, endless=True, checkpoint__every_steps=0, **engine)
    with running(TORCHRUN, tmp_path) as run:
        run.wait_for(phase.name, lambda: phase.reached(run))
        run.signal(signal.SIGKILL)
        run.wait()
        run.gone(within_s=5.0)
    assert len(run.attempts()) == 1
    after = finish_here(tmp_path, run.step() + 1)
    assert after.start_step(1) == 0
    samples_are_consecutive(after)


@pytest.mark.full
def test_second_start_under_torchrun_is_refused(engine: dict[str, Any], tmp_path: Path) -> None:
    phase = BY_NAME["step"]
    phase.write(tmp_path, endless=True, **engine)
    with running(TORCHRUN, tmp_path) as run:
        run.wait_for(phase.name, lambda: phase.reached(run))
        with running(TORCHRUN, tmp_path) as second:
            assert second.wait() == 1
            assert second.output.count("already running") == 1
        assert len(run.attempts()) == 1


@under_both
def test_time_limit_under_slurm_asks_to_be_started_again(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, train__time_limit_s=0.001, **engine)
    assert run_ranks(1, _start, config, env={"SLURM_JOB_ID": "7"}) == [75]


def _start(config: dict[str, Any]) -> int:
    return start(Config.model_validate(config), StopWish())


@pytest.mark.full
def test_one_process_finished_wrong_and_failed(engine: dict[str, Any], tmp_path: Path) -> None:
    write_config(tmp_path, train__steps=2, **engine)
    assert finish(PROCESS, tmp_path).end()["reason"] == "finished"
    before = sorted(tmp_path.joinpath("run").rglob("*"))
    for way in (PROCESS, LAUNCH):
        with running(way, tmp_path, "optim.lr=7.0") as wrong:
            assert wrong.wait() == 2
            assert "was begun with another config: optim.lr" in wrong.output
    assert sorted(tmp_path.joinpath("run").rglob("*")) == before
    other = f"run.dir={tmp_path / 'other'}"
    grows = ("optim.lr=1000", "optim.weight_decay=10", "train.steps=50")  # weights grow 10^4 times per step
    with running(PROCESS, tmp_path, other, *grows) as failed:
        assert failed.wait() == 1
        assert "FAILED: step" in failed.output
