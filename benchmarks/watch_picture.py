"""The picture of `watch` in the docs, from a real run of the demo on this machine.

python benchmarks/watch_picture.py [--nproc 4] [--out docs/pictures/watch.svg]
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.terminal_theme import MONOKAI

from launch.look.watch import Watcher
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

STEP = 30  # the step at which the picture is taken
PATIENCE_S = 240.0
_FETCHED = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # the font: a picture loads nothing from elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/watch.svg"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-picture-") as place:
        folder = RunFolder(Path(place) / "demo")
        command = [sys.executable, "-m", "launch", "run", "demo", "--nproc", str(options.nproc)]
        command += [f"run.dir={folder.root}", "train.steps=1000", "train.micro_batch=8", "checkpoint.every_steps=10"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as run:
            try:
                wait_for_step(folder, STEP)
                picture = drawn(folder)
            finally:
                run.send_signal(signal.SIGINT)
    options.out.write_text(picture)
    print(f"wrote {options.out}")


def wait_for_step(folder: RunFolder, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(row.get("step", 0) >= step for row in read_rows(folder.metrics)):
        assert time.monotonic() < deadline, f"no step {step} within {PATIENCE_S:g} s"
        time.sleep(0.5)


def drawn(folder: RunFolder) -> str:
    """The screen in 80 columns, as on a terminal."""
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Watcher(folder).look(None))
    return _FETCHED.sub("", console.export_svg(title="python -m launch watch runs/demo", theme=MONOKAI))


if __name__ == "__main__":
    main()
