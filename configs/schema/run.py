"""The `run` section of the config."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from configs.paths import PathText, fitting
from configs.schema.section import MOST_S, MOST_STEPS, MOST_TIMES, Section, result, speed


class RunSection(Section):
    """The run itself: where it lives, what is written down."""

    name: Annotated[str, AfterValidator(fitting)] = speed(
        "run", "name of the run; the folder is `runs/<name>` unless `run.dir` is given", min_length=1
    )
    dir: PathText | None = speed(None, "the run folder, on a filesystem that every node sees")
    seed: int = result(0, "seed of initialisation, data order and dropout", ge=0, le=2**63 - 1)
    accept_changes: list[str] = speed(
        [], "keys that may differ from what this folder was begun with; `data.content`: what the sources hold"
    )
    log_every_steps: int = speed(10, "steps between two rows of metrics.jsonl", ge=1, le=MOST_STEPS)
    tensorboard: bool = speed(True, "also write the metrics for TensorBoard")
    wandb: str | None = speed(
        None, "project of Weights & Biases that gets the metrics, too; needs muster[wandb]", min_length=1
    )
    stop_grace_s: float = speed(
        120.0, "how long a stopping run may take to save before it is ended by force", gt=0, le=MOST_S
    )
    max_restarts: int = speed(3, "restarts in place after a failure, by `launch run`", ge=0, le=MOST_TIMES)
    give_up_after: int = speed(3, "attempts without a new checkpoint before the run is given up", ge=1, le=MOST_TIMES)
