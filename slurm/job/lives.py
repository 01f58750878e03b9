"""The lives of a job in its run folder: the last word of each node, and how each life ended.

A requeued job keeps its number and gets another life. Slurm's own exit code cannot tell how a life ended. It is the
highest code of all tasks, and a task that is killed because another one left has a high code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.look.run_folder import LIVES, Outcome, outcomes
from trainer.host.environment import SLURM_JOB_ID, SLURM_RESTART_COUNT
from trainer.life.attempts import USER_ERROR, End, newest
from trainer.life.folder import RunFolder, write_json
from trainer.life.rows import record_in, text, whole


@dataclass(frozen=True)
class Left:
    """What one node wrote when its supervisor left. `before`: the newest attempt when it started, -1 without one."""

    node: str
    code: int
    before: int


class Life:
    """One life of a job: a folder `slurm/lives/JOB-LIFE` of the run folder."""

    def __init__(self, folder: RunFolder, job: str, number: int) -> None:
        self.folder, self.job, self.number = folder, job, number
        self.path = lives_of(folder) / f"{job}-{number}"

    @classmethod
    def here(cls, folder: RunFolder, environment: Mapping[str, str]) -> Life:
        """The life that this process belongs to."""
        return cls(folder, str(SLURM_JOB_ID.need(environment)), SLURM_RESTART_COUNT.read(environment) or 0)

    def leave(self, left: Left) -> None:
        """Write a node's last word. After a mistake that changed no file, write none: the exit code is enough then."""
        touched = lives_of(self.folder).parent.exists() or self.folder.attempts.exists()
        if touched or (left.code != USER_ERROR and self.folder.root.exists()):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / f"node-{left.node}.json", asdict(left))

    def wrote(self, event: dict[str, Any]) -> bool:
        """Whether a launcher of this life wrote the event."""
        return text(event, "job") == self.job and whole(event, "life") == self.number

    def left(self) -> dict[str, Left]:
        """Node -> its last word."""
        words = [record_in(Left, path) for path in sorted(self.path.glob("node-*.json"))]
        return {word.node: word for word in words if word is not None}

    def end(self, outcome: Outcome) -> None:
        """Write the outcome as the latest, even if the time of day was set back since the one before."""
        if self.folder.root.exists():
            latest_s = max((known.time_s for known in outcomes(self.folder)), default=0.0)
            outcome = replace(outcome, time_s=max(outcome.time_s, latest_s + 0.001))
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "outcome.json", asdict(outcome))


def lives_of(folder: RunFolder) -> Path:
    return folder.root / LIVES


def failures_without_progress(folder: RunFolder, step: int) -> int:
    """How many of the latest lives failed without a checkpoint newer than `step`. Preemptions do not count."""
    count = 0
    for outcome in reversed(outcomes(folder)):
        if outcome.step < step or outcome.reason == "finished":
            break
        count += outcome.reason == "failed"
    return count


def end_of_life(folder: RunFolder, left: dict[str, Left]) -> End | None:
    """How the newest attempt of this life ended, if that was written down."""
    if not left:
        return None
    attempt = newest(folder)
    return attempt.end if attempt is not None and attempt.number > min(word.before for word in left.values()) else None
