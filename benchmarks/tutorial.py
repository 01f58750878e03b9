"""Run the `sh` blocks of docs/tutorial.md as written, in an empty folder, and stop at the first that fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: Path) -> list[str]:
    """The fenced `sh` blocks of a page, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S)


def main() -> int:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="muster-tutorial-") as folder:
        for number, block in enumerate(blocks(ROOT / "docs/tutorial.md"), 1):
            print(f"\n--- block {number}\n{block}---", flush=True)
            began = time.perf_counter()
            done = subprocess.run(["bash", "-eu", "-c", block], cwd=folder, env=env, timeout=300, check=False)
            print(f"--- block {number}: exit code {done.returncode}, {time.perf_counter() - began:.1f} s", flush=True)
            if done.returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
