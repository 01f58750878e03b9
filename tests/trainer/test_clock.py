"""The time of day jumps by years while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.config import Config
from launch.look.goodput import goodput
from tests.distributed import run_ranks, tiny
from trainer.data import files
from trainer.host import clock
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.lease import _self_description, alive_here
from trainer.life.rows import read_rows
from trainer.life.stop import StopWish
from trainer.run import Run
from trainer.start import start

FIVE_YEARS_S = 5 * 365 * 24 * 3600.0
JUMPS = pytest.mark.parametrize("jump_s", [FIVE_YEARS_S, -FIVE_YEARS_S], ids=["forwards", "back"])


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    clock.booted_s.cache_clear()
    yield
    clock.booted_s.cache_clear()


def set_clock(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """Set the clock as a person or a time server does. (libfaketime would break `sleep` as well.)"""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)


@JUMPS
def test_the_runs_clock_does_not_jump(jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    before = clock.now_s()
    assert before == pytest.approx(time.time(), abs=1.0)
    set_clock(monkeypatch, jump_s)
    assert 0 <= clock.now_s() - before < 60
    assert clock.jumped_s() == pytest.approx(jump_s, abs=1.0)


def test_processes_of_a_launcher_share_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a process that begins after the jump."""
    launcher = clock.now_s()
    monkeypatch.setenv("MUSTER_CLOCK", f"{clock.booted_s():.6f}")
    set_clock(monkeypatch, FIVE_YEARS_S)
    clock.booted_s.cache_clear()
    assert 0 <= clock.now_s() - launcher < 60
    assert clock.began_s() == pytest.approx(psutil.Process().create_time(), abs=2.0)


def jumping(config: dict[str, Any], jump_s: float) -> int:
    """A run whose clock is set in the middle."""
    real = time.time

    class Set(Run):
        def poll_saves(self, wait: bool = False) -> None:
            if self.progress.step == 3:
                time.time = lambda: real() + jump_s
            super().poll_saves(wait)

    return start(Config.model_validate(config), StopWish(), Set)


@JUMPS
def test_a_runs_stamps_and_its_report_tell_the_time_that_passed(jump_s: float, tmp_path: Path) -> None:
    began = time.monotonic()
    assert run_ranks(1, jumping, tiny(tmp_path, checkpoint__every_steps=2), jump_s) == [0]
    took_s = time.monotonic() - began
    folder = RunFolder(tmp_path / "run")
    stamps = [row["time_s"] for row in read_rows(folder.metrics) + read_events(folder)]
    assert max(stamps) - min(stamps) < took_s
    found = goodput(folder)
    assert 0 < found.allocated_s < took_s + 60  # the start of the test's server does not count
    assert all(0 <= seconds <= found.allocated_s for seconds in found.seconds.values())


def test_a_jump_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = clock.Watch()
    assert watch.jumped_s() is None
    set_clock(monkeypatch, FIVE_YEARS_S)
    assert watch.jumped_s() == pytest.approx(FIVE_YEARS_S, abs=1.0)
    assert watch.jumped_s() is None


@JUMPS
def test_a_holder_lives_on_when_the_clock_is_set(jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil counts a process's start from the time of day."""
    holder = _self_description("here", 0)
    began_s = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: began_s + jump_s)
    assert alive_here(holder, "here") is True
    assert alive_here(holder | {"started_ticks": holder["started_ticks"] + 1}, "here") is False
    assert alive_here({k: v for k, v in holder.items() if k != "started_ticks"}, "here") is False  # as older ones were


def test_data_under_preparation_is_no_leftover_when_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with files.temporary_folder(tmp_path) as folder:
        set_clock(monkeypatch, FIVE_YEARS_S)
        files.remove_leftovers(tmp_path)
        assert folder.is_dir()
