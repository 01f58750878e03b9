"""Small pieces of output that all verbs of `python -m launch checkpoint` share."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from configs.errors import UserError, printable
from launch.look.text import size_text
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.load.kinds import find_kind, open_checkpoint
from trainer.host.arguments import typed
from trainer.host.terminal import say

_LOG_EVERY_S = 5.0
_DRAW_EVERY_S = 0.1


def layout_text(layout: dict[str, Any]) -> str:
    """`fsdp shard 4 x replicate 2`, or `-` when the checkpoint has no layout."""
    sizes = [f"{name} {n}" for name, n in layout.items() if isinstance(n, int) and n > 1]
    engine = str(layout.get("engine", ""))
    if not layout:
        return "-"
    return " ".join([engine, " x ".join(sizes) or "one process"]).strip()


def open_named(path: Path) -> Checkpoint:
    """The Muster checkpoint that a person named. A damaged one raises UserError too."""
    kind, found = find_kind(path)
    if kind != "muster":
        raise UserError(f"{path}: not a Muster checkpoint; convert it first: {typed('launch checkpoint convert')}")
    try:
        return open_checkpoint(found)
    except BadCheckpoint as error:
        raise UserError(f"{error}\nlook further with: {typed('launch checkpoint verify', found)}") from None


class Progress:
    """Bytes done, on stderr: a bar on a terminal, else a line every few seconds. May be called from any thread."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._began = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._drawn = False
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._shown >= (_DRAW_EVERY_S if self._terminal else _LOG_EVERY_S):
                self._shown = now
                self._draw()

    def close(self) -> None:
        """Remove the bar."""
        if self._terminal and self._drawn:
            self._write("\r\x1b[K")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def _draw(self) -> None:
        share = self.done / self.total if self.total else 1.0
        speed = self.done / max(self.seconds, 1e-9) / 1e9
        text = printable(
            f"{self.what} {share:4.0%}  {size_text(self.done)} of {size_text(self.total)}  {speed:.2f} GB/s"
        )
        if self._terminal:
            filled = int(30 * min(share, 1.0))
            self._write(f"\r\x1b[K[{'#' * filled}{'.' * (30 - filled)}] {text}")
            self._drawn = True
        else:
            say(text, sys.stderr)
