"""Tell the user's hooks how a life of a job ended: finished, stopped, failed or requeued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from configs.schema.slurm import SlurmSection
from launch.hooks import Hooks
from trainer.life.attempts import End


@dataclass(frozen=True)
class Happened:
    """The facts that a hook gets."""

    event: str  # finished, stopped, failed, requeued
    run: str
    folder: str
    job: str
    step: int
    cause: str
    text: str  # the whole message in one line, for people; chat services show this key

    @classmethod
    def of(cls, end: End, requeued: bool, run: str, folder: str, job: str) -> Happened:
        event, cause = "requeued" if requeued else end.reason, end.cause or ""
        text = f"{run}: {event} at step {end.step}" + (f" ({cause})" if cause else "") + f", job {job}"
        return cls(event, run, folder, job, end.step, cause, text)


def tell(section: SlurmSection, happened: Happened, say: Callable[[str], None]) -> None:
    """Call the hooks, and wait for them for some seconds. Never raises."""
    hooks = Hooks(section.hook, section.webhook, say)
    hooks.tell(asdict(happened))
    hooks.wait()
