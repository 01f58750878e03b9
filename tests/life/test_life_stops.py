"""A stop request in each phase, from each cause, ends as docs/life.md's table says, and the run goes on from there."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines import ENGINES, rows
from tests.life.phases import PHASES, Phase
from tests.life.runs import LAUNCH, Running, Watched, clean_end, finish, finish_here, running, samples_are_consecutive


@dataclass
class StopCause:
    """`act` is None where the config causes the stop. The exit code is 3 for a person's stop, 75 for a machine's."""

    name: str
    word: str
    code: int
    act: Callable[[Running], None] | None
    since: float = 0.0

    def limit(self, phase: Phase) -> dict[str, float]:
        """Changes of the config."""
        return {"train__time_limit_s": phase.limit_s} if self.act is None else {}

    def bring_about(self, run: Running, phase: Phase) -> None:
        """Wait for the phase, and act. A time limit comes by itself; on a slow machine even before the phase."""
        if self.act is not None:
            run.wait_for(phase.name, lambda: phase.reached(run))
            self.since = time.time()
            self.act(run)

    def seconds(self, run: Running) -> str:
        """Seconds from the cause until everything is gone."""
        told = run.events("stop_requested", "ended")[0]["time_s"]
        return f"{time.time() - (told if self.act is None else self.since):.1f}"


CAUSES = [
    StopCause("STOP file", "stop_file", 3, lambda run: _touch_stop(run)),
    StopCause("SIGINT", "interrupt", 3, lambda run: run.signal(signal.SIGINT)),
    StopCause("SIGTERM", "terminate", 75, lambda run: run.signal(signal.SIGTERM)),
    StopCause("SIGUSR2 to all", "warning", 75, lambda run: run.signal_all(signal.SIGUSR2)),
    StopCause("SIGHUP", "hangup", 3, lambda run: run.signal(signal.SIGHUP)),
    StopCause("time limit", "time_limit", 3, None),
]
ONCE = [("saving", "SIGTERM", "fsdp")]


def _touch_stop(run: Running) -> None:
    run.folder.root.mkdir(parents=True, exist_ok=True)
    run.folder.stop.touch()


@pytest.mark.parametrize(("phase", "cause", "engine"), rows(ONCE, PHASES, CAUSES, ENGINES), indirect=["engine"])
def test_stop(
    phase: Phase, cause: StopCause, engine: dict[str, Any], tmp_path: Path, full: bool, note: Callable[..., None]
) -> None:
    phase.write(tmp_path, endless=True, **engine, **cause.limit(phase))
    with running(LAUNCH, tmp_path) as run:
        cause.bring_about(run, phase)
        if phase.name == "saving" and cause.word not in ("stop_file", "time_limit"):
            run.wait_for("the first signal's effect", lambda: run.events("stop_passed_on"))
            run.signal(signal.SIGINT if cause.word == "terminate" else signal.SIGTERM)  # changes nothing
        code = run.wait()
        clean_end(run)
        seconds = cause.seconds(run)
        stopped_as_told(run, phase, cause, code)

    step = run.end()["step"]
    attempts = len(run.attempts())
    phase.shorten(tmp_path)
    last = step + 2
    if full:
        after: Watched = finish(LAUNCH, tmp_path, f"train.steps={last}", "train.time_limit_s=null")
        assert not run.folder.lease.exists()
    else:
        after = finish_here(tmp_path, last)
    resumed = after.start_step(attempts)
    assert resumed == step
    assert after.end()["reason"] == "finished"
    assert after.step() == after.committed() == last
    samples_are_consecutive(after)
    note("launch run", phase.name, cause.name, code, seconds, resumed)


def stopped_as_told(run: Running, phase: Phase, cause: StopCause, code: int) -> None:
    """Check the exit code, end.json, events and files of a stop."""
    end = run.end()
    assert end["step"] == run.step()
    assert end["checkpoint"] == (f"step-{end['step']:08d}" if end["step"] else None)
    assert run.committed() == end["step"]
    assert not list(run.folder.checkpoints.glob("*.partial-*"))
    assert not run.folder.stop.exists()
    assert (run.attempts()[-1] / "STOP").exists() == (cause.word == "stop_file")
    assert len(run.attempts()) == (2 if phase.before else 1)
    if phase.name == "last step" and end["reason"] == "finished":  # asked for when the last step had begun
        assert (code, end["step"], end["requeue"]) == (0, phase.steps, False)
        return
    assert code == cause.code, run.output
    assert (end["reason"], end["cause"], end["requeue"]) == ("stopped", cause.word, cause.code == 75)
    assert [e["cause"] for e in run.told_by("rank00000", "stop_requested")] == [cause.word]
    assert {e["cause"] for e in run.events("stop_requested")} <= {cause.word, "another_rank"}
    if phase.name == "preparation":
        assert not list(run.cache.glob("words-*"))  # it left at once, not when all was prepared
    if phase.name == "validation":
        assert not [row for row in run.rows() if row["step"] == end["step"] and "loss" not in row]
    if phase.name in ("start-up", "preparation"):
        assert end["step"] == phase.before
