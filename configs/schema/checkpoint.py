"""The `checkpoint` section of the config."""

from __future__ import annotations

from typing import Literal

from configs.schema.section import MOST_STEPS, MOST_TIMES, Section, speed


class KeepSection(Section):
    """Which checkpoints stay when newer ones are committed."""

    last: int = speed(2, "the newest ones", ge=1, le=MOST_TIMES)
    every_steps: int = speed(0, "also every step that this divides; 0: none", ge=0, le=MOST_STEPS)
    best: bool = speed(True, "also the one with the lowest validation loss")


class CheckpointSection(Section):
    """When and how state is saved."""

    every_steps: int = speed(500, "steps between saves; 0: only at the end", ge=0, le=MOST_STEPS)
    asynchronous: bool = speed(True, "write while training goes on, from one copy in host memory")
    failures_limit: int = speed(3, "failed saves in a row before the run fails", ge=1, le=MOST_TIMES)
    frozen: Literal["stored", "reference"] = speed(
        "stored", "frozen parameters: in each checkpoint (by hard links), or left in that of `start.from` and named"
    )
    keep: KeepSection = speed(KeepSection(), "which checkpoints stay")
