"""A stop request in each phase, from each cause, ends as the life table says, and the run goes on from there."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.life.phases import BY_NAME, PHASES, Phase
from tests.life.runs import LAUNCH, Running, Watched, clean_end, finish, finish_here, running, samples_are_consecutive


@dataclass(frozen=True)
class StopCause:
    """`act` is None where the config brings the stop about. A person's wish is 3, a machine's 75."""

    name: str
    word: str
    code: int
    act: Callable[[Running], None] | None


CAUSES = [
    StopCause("STOP file", "stop_file", 3, lambda run: _touch_stop(run)),
    StopCause("SIGINT", "interrupt", 3, lambda run: run.signal(signal.SIGINT)),
    StopCause("SIGTERM", "terminate", 75, lambda run: run.signal(signal.SIGTERM)),
    StopCause("SIGUSR2 to all", "warning", 75, lambda run: run.signal_all(signal.SIGUSR2)),
    StopCause("SIGHUP", "hangup", 3, lambda run: run.signal(signal.SIGHUP)),
    StopCause("time limit", "time_limit", 3, None),
]
CAUSE_BY_NAME = {cause.name: cause for cause in CAUSES}
EACH_ONCE = [
    ("start-up", "SIGINT"),
    ("preparation", "SIGHUP"),
    ("compile", "SIGUSR2 to all"),
    ("step", "STOP file"),
    ("validation", "time limit"),
    ("saving", "SIGTERM"),
    ("last step", "STOP file"),
]


def _touch_stop(run: Running) -> None:
    run.folder.root.mkdir(parents=True, exist_ok=True)
    run.folder.stop.touch()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "phase" in metafunc.fixturenames:
        every = [(phase.name, cause.name) for phase in PHASES for cause in CAUSES]
        pairs = every if metafunc.config.getoption("full", False) else EACH_ONCE
        metafunc.parametrize(("phase", "cause"), [(BY_NAME[p], CAUSE_BY_NAME[c]) for p, c in pairs], ids=_name)


def _name(value: Phase | StopCause) -> str:
    return value.name.replace(" ", "-")


def test_stop(phase: Phase, cause: StopCause, tmp_path: Path, full: bool, note: Callable[..., None]) -> None:
    limit = {"train__time_limit_s": phase.limit_s} if cause.act is None else {}
    phase.write(tmp_path, endless=True, **limit)
    with running(LAUNCH, tmp_path) as run:
        if cause.act is None and phase.name == "start-up":
            since = time.monotonic()
        else:
            run.wait_for(phase.name, lambda: phase.reached(run))
            since = time.monotonic()
        if cause.act is not None:
            cause.act(run)
        if phase.name == "saving" and cause.word not in ("stop_file", "time_limit"):
            run.wait_for("the first signal's effect", lambda: run.events("stop_passed_on"))
            run.signal(signal.SIGINT if cause.word == "terminate" else signal.SIGTERM)  # changes nothing
        code = run.wait()
        clean_end(run)
        seconds = time.monotonic() - since
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
    note("launch run", phase.name, cause.name, code, f"{seconds:.1f}", resumed)


def stopped_as_told(run: Running, phase: Phase, cause: StopCause, code: int) -> None:
    """Exit code, end.json, events and files of a stop."""
    end = run.end()
    assert end["step"] == run.step()
    assert end["checkpoint"] == (f"step-{end['step']:08d}" if end["step"] else None)
    assert run.committed() == end["step"]
    assert not list(run.folder.checkpoints.glob("*.partial-*"))
    assert not run.folder.stop.exists()
    assert (run.attempts()[-1] / "STOP").exists() == (cause.word == "stop_file")
    assert len(run.attempts()) == (2 if phase.before else 1)
    if phase.name == "last step" and end["reason"] == "finished":  # its steps are done, whoever asked for what
        assert (code, end["step"], end["requeue"]) == (0, phase.steps, False)
        return
    assert code == cause.code, run.output
    assert (end["reason"], end["cause"], end["requeue"]) == ("stopped", cause.word, cause.code == 75)
    assert [e["cause"] for e in run.told_by("rank00000", "stop_requested")] == [cause.word]
    assert {e["cause"] for e in run.events("stop_requested")} <= {cause.word, "another_rank"}
    if phase.name in ("start-up", "preparation"):
        assert end["step"] == phase.before
