"""Run the `sh` blocks of the tutorials as written, each page in an empty folder. Stop at the first that fails."""

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


def run_page(page: Path) -> bool:
    """Whether every block of the page ends well."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="muster-tutorial-") as folder:
        for number, block in enumerate(blocks(page), 1):
            print(f"\n--- {page.name}, block {number}\n{block}---", flush=True)
            began = time.perf_counter()
            done = subprocess.run(["bash", "-eu", "-c", block], cwd=folder, env=env, timeout=600, check=False)
            print(f"--- block {number}: exit code {done.returncode}, {time.perf_counter() - began:.1f} s", flush=True)
            if done.returncode:
                return False
    return True


def main() -> int:
    pages = sys.argv[1:] or ["docs/tutorial.md", "docs/freezing.md", "docs/own-task.md"]
    return 0 if all(run_page(ROOT / page) for page in pages) else 1


if __name__ == "__main__":
    sys.exit(main())
