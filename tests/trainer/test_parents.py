"""A worker whose parent is gone does not begin."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "from trainer.parents import die_with_parent; die_with_parent(); print('alive')"


@pytest.mark.parametrize(
    ("environment", "alive"),
    [
        ({}, True),  # started by hand
        ({"TORCHELASTIC_RUN_ID": "1"}, True),
        ({"MUSTER_PARENT": str(os.getpid())}, True),
        ({"MUSTER_PARENT": "1"}, False),  # named one parent, finds itself the child of another
    ],
    ids=["by hand", "torchrun", "its own", "another"],
)
def test_parent(environment: dict[str, str], alive: bool) -> None:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == ((0, "alive\n") if alive else (1, ""))
