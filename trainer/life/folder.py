"""The run folder: plain files that all parts of a run meet in. Paths only, no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import kind_fault
from trainer.life.entries import checkpoint_name, committed_steps


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


def wrong_kinds(folder: RunFolder) -> list[str]:
    """A line for each path of a run folder that is a folder where a file must be, a pipe, or the other way round.

    Whoever writes there later would fail at the first save, or wait for ever. Raises OSError when it cannot be seen.
    """
    folders = [folder.root, folder.attempts, folder.checkpoints, folder.events, folder.gpu, folder.root / "slurm"]
    folders += [folder.root / "slurm/lives", folder.tensorboard, folder.wandb]
    files = [folder.config, folder.metrics, folder.lease, folder.stop, folder.profile, folder.readings]
    files += [folder.root / "slurm/job.json", folder.wandb / "run.json"]
    if folder.attempts.is_dir():
        folders += [folder.attempts / name for name in sorted(os.listdir(folder.attempts)) if name.isdigit()]
    for place in (folder.events, folder.gpu):
        files += sorted(place.glob("*.jsonl"))
    wanted = [*((path, True) for path in folders), *((path, False) for path in files)]
    return [f"{path}: {fault}" for path, is_folder in wanted if (fault := kind_fault(path, is_folder)) is not None]


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
