"""The `train` section of the config."""

from __future__ import annotations

from pydantic import model_validator

from configs.schema.section import MOST_S, MOST_STEPS, MOST_TIMES, Section, result, speed


class TrainSection(Section):
    """How long to train, and in what batches."""

    steps: int = result(
        0,
        "the absolute last step; may change later: the schedule then ends at the new one, and a line says the new rate",
        ge=0,
        le=MOST_STEPS,
    )
    epochs: float | None = result(None, "in place of steps: passes over all training samples", gt=0, le=MOST_STEPS)
    global_batch: int = result(..., "samples per update over all ranks", ge=1, le=10**8)
    micro_batch: int = speed(1, "samples per rank and forward, at most", ge=1, le=MOST_TIMES)
    clip_norm: float | None = result(1.0, "largest global gradient norm", gt=0, le=1e30)
    nonfinite_limit: int = result(5, "updates skipped in a row before the run fails", ge=1, le=MOST_STEPS)
    validate_every_steps: int = speed(0, "steps between validations; 0: never", ge=0, le=MOST_STEPS)
    validate_samples: int = result(256, "validation samples, at most", ge=1, le=10**12)
    best_metric: str | None = result(
        None, "the metric of validation that decides which checkpoint is best; default: the loss", min_length=1
    )
    early_stop_patience: int = result(
        0, "validations without a better one before the run ends; 0: never", ge=0, le=MOST_STEPS
    )
    time_limit_s: float | None = speed(None, "an attempt stops with a save after this long", gt=0, le=MOST_S)

    @model_validator(mode="after")
    def _length(self) -> TrainSection:
        if "steps" not in self.model_fields_set and self.epochs is None:
            raise ValueError("steps is missing: how long to train (or epochs)")
        if self.steps and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    @model_validator(mode="after")
    def _early_stop(self) -> TrainSection:
        if self.early_stop_patience and not self.validate_every_steps:
            raise ValueError("early_stop_patience needs validate_every_steps")
        return self
