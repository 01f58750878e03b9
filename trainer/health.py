"""Steps that went wrong: updates that were skipped because a number was not finite."""

from __future__ import annotations

from configs.config import Config
from trainer.life.events import Events
from trainer.progress import Progress
from trainer.step import RunFailed, StepResult


class Health:
    """Counts skipped updates and ends a run that skips too many in a row."""

    def __init__(self, config: Config, progress: Progress, events: Events, first: bool) -> None:
        self.config, self.progress, self.events, self.first = config, progress, events, first

    def check(self, result: StepResult) -> None:
        """Look at one step. Every rank comes to the same verdict: the norm is the same everywhere.

        A rank whose loss was not finite names its samples; when only the gradients were not, rank 0 names its share of
        the batch. Raises RunFailed after `train.nonfinite_limit` skips in a row.
        """
        progress = self.progress
        if result.applied:
            progress.nonfinite_in_a_row = 0
            return
        progress.nonfinite_in_a_row += 1
        if result.bad_samples:
            self.events.write("nonfinite", step=result.step, what="loss", samples=result.bad_samples[:64])
        elif self.first and not result.bad_loss:
            samples = [int(n) for n in result.batch.samples[:64]]
            self.events.write("nonfinite", step=result.step, what="gradient", samples=samples)
        if progress.nonfinite_in_a_row >= self.config.train.nonfinite_limit:
            raise RunFailed(
                "nonfinite",
                f"step {result.step}: loss or gradient not finite {progress.nonfinite_in_a_row} times in a row; "
                f"the samples are named in {self.events.path.parent}",
            )
