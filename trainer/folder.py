"""The run folder: plain files that all parts of a run meet in. Paths only, no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.entries import checkpoint_name, committed_steps
from trainer.rows import read_json as read_json  # beside the one that writes it


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies where. Every path is below `root`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def lease(self) -> Path:
        return self.root / "LEASE"

    @property
    def stop(self) -> Path:
        return self.root / "STOP"

    @property
    def profile(self) -> Path:
        return self.root / "PROFILE"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events"

    @property
    def gpu(self) -> Path:
        return self.root / "gpu"

    @property
    def readings(self) -> Path:
        return self.gpu / "readings.json"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def cache(self, configured: str | None) -> Path:
        """Where prepared samples lie: beside the runs, so that several runs share them."""
        return Path(configured) if configured else self.root.parent / ".cache"

    def committed_steps(self) -> list[int]:
        """Steps that have a committed checkpoint, ascending; by name alone."""
        return committed_steps(self.checkpoints)

    def newest_checkpoint(self) -> tuple[int, str | None]:
        """(step, name) of the newest committed checkpoint; (0, None) without one."""
        steps = self.committed_steps()
        return (steps[-1], checkpoint_name(steps[-1])) if steps else (0, None)


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all, durably: a reader on another node sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it would be one more file
        raise


def write_json(path: Path, data: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")
