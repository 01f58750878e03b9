"""The disk fills, or the run folder is moved, while a run goes on: one line with the first cause."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.config import Config
from tests.distributed import run_ranks, tiny
from trainer.host.console import Console
from trainer.life.events import Events
from trainer.life.folder import RunFolder, write_json
from trainer.life.stop import Cause, StopWish
from trainer.run import Run
from trainer.start import start
from trainer.step import RunFailed


def move_away(run: Run) -> None:
    run.folder.root.rename(run.folder.root.with_name("moved"))


def fill_the_disk(run: Run) -> None:
    """Fill the disk for all that records a failure. /dev/full answers every write as a full disk does."""
    run.attempt.path.joinpath(f".end.json.{os.getpid()}").symlink_to("/dev/full")
    run.events.path.unlink(missing_ok=True)
    run.events.path.symlink_to("/dev/full")
    run.console._log = os.open("/dev/full", os.O_WRONLY)


def fill_and_fail(run: Run) -> None:
    fill_the_disk(run)
    raise RuntimeError("the first cause")


def fill_and_give_up(run: Run) -> None:
    fill_the_disk(run)
    raise RunFailed(Cause.SAVING.word, "step 3 could not be saved")


def fail(run: Run) -> None:
    raise RuntimeError("the first cause")


def stricken(config: dict[str, Any], strike: Callable[[Run], None], told: str) -> int:
    """A run that meets the fault at step 3. Its output goes to `told`."""
    for number in (1, 2):
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)

    class Stricken(Run):
        def poll_saves(self, wait: bool = False) -> None:
            if self.progress.step == 3 and self.config.run.name != "done":
                self.config = self.config.model_copy(
                    update={"run": self.config.run.model_copy(update={"name": "done"})}
                )
                strike(self)
            super().poll_saves(wait)

    return start(Config.model_validate(config), StopWish(), Stricken)


def struck(tmp_path: Path, strike: Callable[[Run], None]) -> list[str]:
    config = tiny(tmp_path, checkpoint__every_steps=0)
    assert run_ranks(1, stricken, config, strike, str(tmp_path / "told")) == [1]
    return (tmp_path / "told").read_text().splitlines()


def test_a_run_folder_that_is_moved_away(tmp_path: Path) -> None:
    told = struck(tmp_path, move_away)
    assert told[-1] == f"rank 0 failed: {tmp_path}/run is gone: it was moved or removed while this ran"
    assert "Traceback" not in "".join(told)
    assert not (tmp_path / "run").exists()  # no second run folder is made in its place


def test_a_full_disk_does_not_hide_the_first_cause(tmp_path: Path) -> None:
    told = struck(tmp_path, fill_and_fail)
    assert told[-1] == "RuntimeError: the first cause"
    assert sum("Traceback" in line for line in told) == 1
    assert not any("No space" in line for line in told)


def test_a_run_that_gives_up_on_a_full_disk_says_only_that(tmp_path: Path) -> None:
    told = struck(tmp_path, fill_and_give_up)
    assert "FAILED: step 3 could not be saved" in told
    assert not any("Traceback" in line or "No space" in line for line in told)


@pytest.mark.parametrize(("strike", "named"), [(fail, True), (fill_and_fail, False)])
def test_a_log_is_named_only_where_it_can_be_read(strike: Callable[[Run], None], named: bool, tmp_path: Path) -> None:
    config = tiny(tmp_path, checkpoint__every_steps=0)
    codes = run_ranks(2, stricken, config, strike, str(tmp_path / "told"))
    assert codes == [1, 1]
    (line,) = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("rank 0 failed")]
    assert line.startswith("rank 0 failed: RuntimeError: the first cause")
    assert ("traceback in" in line) == named


def test_a_log_that_cannot_be_written_holds_nothing_back(tmp_path: Path) -> None:
    console = Console(rank=0)
    console.open_log(tmp_path / "log")
    assert console.note("one")
    (tmp_path / "log").unlink()
    assert not console.note("two")
    console._log = os.open("/dev/full", os.O_WRONLY)
    assert not console.note("three")


def test_what_a_full_disk_did_not_take_is_not_left(tmp_path: Path) -> None:
    (tmp_path / f".end.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "end.json", {})
    assert list(tmp_path.iterdir()) == []


def test_an_event_makes_no_run_folder_anew(tmp_path: Path) -> None:
    Events(RunFolder(tmp_path / "gone"), "a", "launcher").write("left", code=1)
    assert list(tmp_path.iterdir()) == []
