"""How much memory converting takes: a few buffers, however large the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import convert_memory
import pytest

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.full
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Measured beyond the imports. The largest tensor, a third of the state, is larger than the bound."""
    done = subprocess.run(
        [sys.executable, convert_memory.__file__, str(tmp_path), "300"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert len(grown) == 6
    assert max(grown.values()) < 90e6, grown
