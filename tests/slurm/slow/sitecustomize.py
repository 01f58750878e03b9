"""Makes steps take longer without more computing, so that a fault hits one. The same run elsewhere stays quick.

Put this folder first in PYTHONPATH. SLOW names a file with the seconds that each step waits, and the seconds that each
commit waits.
"""

import os
import sys
import threading
import time


def _seconds(which: int) -> float:
    with open(os.environ["SLOW"]) as file:
        return float(file.read().split()[which])


def _wait_in_each_step() -> None:
    while not hasattr(sys.modules.get("trainer.loop"), "train"):
        time.sleep(0.01)
    loop = sys.modules["trainer.loop"]
    real = loop.train_step

    def slow(*arguments: object) -> object:
        time.sleep(_seconds(0))
        return real(*arguments)

    loop.train_step = slow


def _wait_in_each_commit() -> None:
    real = os.rename

    def slow(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if ".partial-" in os.fspath(source):
            time.sleep(_seconds(1))
        real(source, target)

    os.rename = slow


if "RANK" in os.environ and "SLOW" in os.environ:
    _wait_in_each_commit()
    threading.Thread(target=_wait_in_each_step, daemon=True).start()
