"""Steps that went wrong: updates that were skipped because a number was not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config
from trainer.data.loader import StepBatch
from trainer.events import Events
from trainer.step import RunFailed, StepResult

if TYPE_CHECKING:
    from trainer.loop import Progress


class Health:
    """Counts skipped updates and ends a run that skips too many in a row."""

    def __init__(self, config: Config, progress: Progress, events: Events) -> None:
        self.config, self.progress, self.events = config, progress, events

    def check(self, result: StepResult, batch: StepBatch) -> None:
        """Look at one step. Every rank comes to the same verdict: the norm is the same everywhere.

        A rank whose loss was not finite names its samples; when only the gradients were not, the batch is named by
        rank 0. Raises RunFailed after `train.nonfinite_limit` skips in a row.
        """
        progress = self.progress
        if result.applied:
            progress.nonfinite_in_a_row = 0
            return
        progress.nonfinite_in_a_row += 1
        what = "loss" if result.bad_samples else "gradient"
        samples = result.bad_samples or [int(n) for n in batch.samples]
        self.events.write("nonfinite", step=progress.step, what=what, samples=samples[:64])
        if progress.nonfinite_in_a_row >= self.config.train.nonfinite_limit:
            raise RunFailed(
                "nonfinite",
                f"step {progress.step}: loss or gradient not finite {progress.nonfinite_in_a_row} times in a row; "
                f"the samples are named in {self.events.path.parent}",
            )
