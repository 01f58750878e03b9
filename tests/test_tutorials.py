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
