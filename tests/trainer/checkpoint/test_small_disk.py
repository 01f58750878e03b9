"""A filesystem that is really full, and then has room again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_disk


@pytest.mark.full
def test_saving_on_a_full_disk_and_on(tmp_path: Path) -> None:
    """Needs a mount namespace. Root may make one, and users where the kernel lets them (unshare --user)."""
    namespace = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*namespace, sys.executable, small_disk.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    ok = {row["step"]: row["ok"] for row in told["saves"]}
    assert ok == {1: True, 2: True, 3: False, 4: False, 5: False, 6: True, 7: True}
    for row in told["saves"]:
        assert row["ok"] or "No space left on device" in row["error"]
        assert row["left"] == [f"step-{step:08d}" for step in range(1, row["step"] + 1) if ok[step]]
    assert told["values"] == [[1, 1.0], [2, 2.0], [6, 6.0], [7, 7.0]]
