"""kill -9 of a rank, the agent and the launcher: no process is left, the folder resumes, and restarts have a limit."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines import ENGINES, rows
from tests.life.phases import BY_NAME, PHASES, Phase
from tests.life.runs import LAUNCH, Running, clean_end, finish, finish_here, running, samples_are_consecutive

VICTIMS = ["rank 0", "rank 1", "agent"]
ONCE = [("step", "rank 1", "fsdp")]


def kill(run: Running, victim: str) -> None:
    if victim == "agent":
        run.agent().kill()
        return
    rank = int(victim.split()[1])
    run.wait_for(victim, lambda: rank in run.workers())
    run.workers()[rank].kill()


@pytest.mark.parametrize(("phase", "victim", "engine"), rows(ONCE, PHASES, VICTIMS, ENGINES), indirect=["engine"])
def test_killed_and_started_again_in_place(
    phase: Phase, victim: str, engine: dict[str, Any], tmp_path: Path, note: Callable[..., None]
) -> None:
    phase.write(tmp_path, **engine)
    # With three ranks, restarted ones must not meet the old ones' addresses. Two ranks would not show that.
    three = ("--nproc", "3") if (phase.name, victim) == ("step", "rank 1") else ()
    with running(LAUNCH, tmp_path, *three) as run:
        run.wait_for(phase.name, lambda: phase.reached(run))
        before, committed, since = len(run.attempts()), run.committed(), time.time()
        kill(run, victim)
        phase.shorten(tmp_path)
        code = run.wait()
        clean_end(run)
        assert code == 0, run.output
    end = run.end()
    assert (end["reason"], end["step"]) == ("finished", phase.steps)
    assert not list(run.folder.checkpoints.glob("*.partial-*"))
    assert run.events("stop_requested") == []  # torchrun's SIGTERM to the other ranks is no stop
    if victim == "agent":
        assert [e["status"] for e in run.events("agent_died")] == ([-9] if phase.name != "start-up" else [])
    else:
        assert (int(victim[-1]), -9) in {(e["rank"], e["exit_code"]) for e in run.events("rank_died")}
        assert f"rank {victim[-1]} failed: SIGKILL" in run.output
    resumed = run.start_step(-1)
    assert resumed >= committed
    if phase.name != "start-up":  # at start-up the attempt has not begun
        assert len(run.attempts()) == before + 1
        assert resumed in (0, *range(committed, phase.steps))
    samples_are_consecutive(run)
    again = [e["time_s"] for e in run.events("started")][-1] - since
    note("launch run", phase.name, f"kill -9 {victim}", code, f"{again:.1f} until it trains again", resumed)


@pytest.mark.parametrize(("phase", "engine"), rows([("step", "fsdp")], PHASES, ENGINES), indirect=["engine"])
def test_killed_launcher_takes_everything_along(
    phase: Phase, engine: dict[str, Any], tmp_path: Path, note: Callable[..., None]
) -> None:
    phase.write(tmp_path, endless=True, **engine)
    with running(LAUNCH, tmp_path) as run:
        run.wait_for(phase.name, lambda: phase.reached(run))
        second_start_is_refused(run, tmp_path)
        since = time.monotonic()
        run.signal(signal.SIGKILL)
        code = run.wait()
        run.gone(within_s=10.0)  # by the kernel's signal, down the tree
        seconds = time.monotonic() - since
    assert run.folder.lease.exists()
    attempts, committed = len(run.attempts()), run.committed()
    phase.shorten(tmp_path)
    last = run.step() + 2  # the killed attempt may have begun one step more than it recorded
    assert len([*run.temporary.glob("muster-run-*")]) == 1
    after = finish(LAUNCH, tmp_path, f"train.steps={last}", env={"TMPDIR": str(run.temporary)})
    assert f"taking over {run.folder.root}" in after.output
    assert [path.name for path in run.temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
    clean_end(after)
    resumed = after.start_step(attempts)
    assert resumed == committed
    assert after.end()["reason"] == "finished"
    samples_are_consecutive(after)
    note("launch run", phase.name, "kill -9 launcher", code, f"{seconds:.1f}", resumed)


def second_start_is_refused(run: Running, folder: Path) -> None:
    """A second start ends with 2 in two lines, by the launcher or a bare process. The living run goes on unchanged."""
    lease, attempts = run.folder.lease.read_text(), len(run.attempts())
    with running(LAUNCH, folder) as second:
        assert second.wait(20.0) == 2
        assert f"already running (pid {run.process.pid} on" in second.output
        assert len(second.output.splitlines()) <= 2
    assert run.folder.lease.read_text() == lease
    assert len(run.attempts()) - attempts in (0, 1)  # the run's own first attempt may have begun meanwhile
    assert json.loads(lease)["pid"] == run.process.pid


@pytest.mark.full
def test_gives_up_without_progress(engine: dict[str, Any], tmp_path: Path) -> None:
    """One failed attempt without a checkpoint is allowed. The next one reports that it gives up, and none follows."""
    phase = BY_NAME["step"]
    phase.write(tmp_path, endless=True, run__give_up_after=1, checkpoint__every_steps=0, **engine)
    with running(LAUNCH, tmp_path) as run:
        run.wait_for(phase.name, lambda: phase.reached(run))
        kill(run, "rank 0")
        assert run.wait() == 1
        clean_end(run)
    assert len(run.attempts()) == 2
    end = run.end()
    assert (end["reason"], end["cause"], end["requeue"]) == ("failed", "giving_up", False)
    assert run.events("giving_up")
    assert "giving up after 1 attempts without a new checkpoint" in run.output
    after = finish_here(tmp_path, 2)  # a person may try again
    assert after.end()["reason"] == "finished"


@pytest.mark.full
def test_a_rank_is_named_before_those_that_torchrun_kills_for_it(tmp_path: Path) -> None:
    """A rank that ignores torchrun's SIGTERM is killed 30 s later, which gives the same exit code."""
    phase = BY_NAME["step"]
    phase.write(tmp_path, endless=True, run__max_restarts=0)
    with running(LAUNCH, tmp_path) as run:
        run.wait_for(phase.name, lambda: phase.reached(run))
        run.workers()[0].suspend()
        kill(run, "rank 1")
        assert run.wait() == 1
        clean_end(run)
    assert [(e["rank"], e["exit_code"]) for e in run.events("rank_died")] == [(1, -9), (0, -9)]
    assert "rank 1 failed: SIGKILL" in run.output


@pytest.mark.full
def test_without_restarts_a_killed_rank_ends_the_run(engine: dict[str, Any], tmp_path: Path) -> None:
    phase = BY_NAME["step"]
    phase.write(tmp_path, endless=True, run__max_restarts=0, **engine)
    with running(LAUNCH, tmp_path) as run:
        run.wait_for(phase.name, lambda: phase.reached(run))
        kill(run, "rank 1")
        assert run.wait() == 1
        clean_end(run)
    committed = run.committed()
    assert committed >= 3
    end = run.end()
    assert (end["reason"], end["checkpoint"], end["requeue"]) == ("failed", f"step-{committed:08d}", True)
    after = finish_here(tmp_path, run.step() + 1)
    assert after.start_step(1) == committed
    samples_are_consecutive(after)
