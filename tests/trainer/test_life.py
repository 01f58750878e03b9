"""Ends of attempts: what is written, and what happens to the STOP file."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.life.attempts import Attempt, End, attempts_without_progress
from trainer.life.folder import RunFolder, write_json


@pytest.mark.parametrize(
    ("end", "moved"),
    [
        (End("stopped", 3, None, False, "stop_file"), True),
        (End("finished", 3, None, False), True),  # else it would stop a later start that trains longer
        (End("stopped", 3, None, True, "terminate"), False),  # started again by itself: that start must find it
        (End("failed", 3, None, True, "rank_failed"), False),
    ],
    ids=lambda v: f"{v.reason}-{v.cause}" if isinstance(v, End) else "",
)
def test_stop_file(end: End, moved: bool, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempt = Attempt.open(folder)
    folder.stop.touch()
    attempt.write_end(end)
    assert (attempt.path / "STOP").exists() is moved
    assert folder.stop.exists() is not moved


def test_the_first_end_stands(tmp_path: Path) -> None:
    attempt = Attempt.open(RunFolder(tmp_path))
    first = End("stopped", 3, "step-00000003", True, "terminate")
    attempt.write_end(first)
    attempt.write_end(End("failed", 0, None, True, "SIGKILL"))
    assert attempt.end == first


def test_progress_is_a_new_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert attempts_without_progress(folder) == 0
    for start, committed, expected in ((0, 0, 1), (0, 5, 0), (5, 5, 1), (None, 5, 2), (5, 8, 0)):
        attempt = Attempt.open(folder)
        if start is not None:
            write_json(attempt.path / "start.json", {"start_step": start})
        if committed:
            (folder.checkpoints / f"step-{committed:08d}").mkdir(parents=True, exist_ok=True)
        assert attempts_without_progress(folder) == expected
    attempt.write_end(End("stopped", 8, None, False, "interrupt"))
    assert attempts_without_progress(folder) == 0
