"""A worker whose parent is gone does not begin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.host.environment import FromLauncher

PROGRAM = """
import os
from trainer.__main__ import launcher_of_this
from trainer.host.environment import Ranks
launcher_of_this(Ranks.read(os.environ))
print("alive")
"""
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
UNUSED = Path("/unused")


def launched_by(pid: int) -> dict[str, str]:
    return FromLauncher(0.0, pid, "token", UNUSED, UNUSED, UNUSED, UNUSED, 0.0).environment()


@pytest.mark.parametrize(
    ("environment", "alive"),
    [
        ({}, True),  # started by hand
        (TORCHRUN, True),
        (launched_by(os.getpid()), True),
        (launched_by(1), False),  # it names one parent, and is the child of another
    ],
    ids=["by hand", "torchrun", "its own", "another"],
)
def test_parent(environment: dict[str, str], alive: bool) -> None:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == ((0, "alive\n") if alive else (1, ""))
    assert alive or "MUSTER_PARENT=1, but pid" in done.stderr
