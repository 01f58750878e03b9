"""The tutorials run as they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_command_of_the_tutorials_gives_what_they_show() -> None:
    done = subprocess.run([sys.executable, "benchmarks/tutorial.py"], cwd=ROOT, timeout=1700, check=False)
    assert done.returncode == 0


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_page_on_tasks_of_ones_own_runs_as_written() -> None:
    command = [sys.executable, "benchmarks/tutorial.py", "docs/own-task.md"]
    done = subprocess.run(command, cwd=ROOT, timeout=280, check=False)
    assert done.returncode == 0
