"""How far a run is, and what is due at a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from configs.config import Config
from trainer.checkpoint.format.manifest import Manifest

_BEST = "best_loss"  # what format 1 calls it


@dataclass
class Progress:
    """The loop's own state, as it stands in every checkpoint."""

    step: int = 0
    consumed_samples: int = 0
    nonfinite_in_a_row: int = 0
    validated_step: int = 0
    best_score: float | None = None  # lower is better: a metric of which more is better counts negative
    validations_without_better: int = 0

    def state(self) -> dict[str, Any]:
        return {_BEST if name == "best_score" else name: value for name, value in asdict(self).items()}

    @property
    def is_best(self) -> bool:
        """Whether this very step has the best validation so far."""
        return self.best_score is not None and self.validated_step == self.step and not self.validations_without_better

    @classmethod
    def of(cls, manifest: Manifest) -> Progress:
        """Step and position are the manifest's own; `loop` agrees, where it says them at all."""
        loop: dict[str, Any] = {**manifest.loop}
        loop["best_score"] = loop.get(_BEST)
        known = {f.name: loop[f.name] for f in fields(cls) if f.name in loop}
        samples = manifest.position.get("consumed_samples", 0)
        return cls(**{**known, "step": manifest.step, "consumed_samples": samples})


def due(step: int, every_steps: int) -> bool:
    """Whether something done `every_steps` (0: never) is done at this step."""
    return every_steps > 0 and step % every_steps == 0


def saves_to_come(config: Config, step: int) -> int:
    """How many saves a run that is not stopped makes after `step`, at most: a validation saves when it is the best."""
    last = config.train.steps
    if step >= last:
        return 0
    every = [config.checkpoint.every_steps, config.train.validate_every_steps if config.checkpoint.keep.best else 0]
    regular = sum((last - 1) // steps - step // steps for steps in every if steps > 0)
    return regular + sum(step <= change.step < last for change in config.freeze.schedule) + 1  # the last step's
