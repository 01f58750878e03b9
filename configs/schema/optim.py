"""The `optim` section of the config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.schema.section import MOST_STEPS, Section, result


class OptimSection(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd", "muon"] = result(
        "adamw", "muon: Muon on the blocks' matrices, AdamW elsewhere"
    )
    lr: float = result(3e-4, "peak learning rate (of AdamW's part, under muon)", gt=0, le=1000)
    muon_lr: float = result(0.02, "peak learning rate of Muon's part", gt=0, le=1000)
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = result([0.9, 0.95], "Adam's decay rates")
    eps: float = result(1e-8, "Adam's epsilon", gt=0, le=1)
    momentum: float = result(0.9, "of SGD and Muon", ge=0, lt=1)
    weight_decay: float = result(
        0.1,
        "on matrices, never on norms and biases; under adam and sgd, where it is part of the gradient, 0 unless given",
        ge=0,
        le=1000,
    )
    l1: float = result(
        0.0, "adds l1 * sign(w) to the gradient of matrices, after clipping: the penalty l1 * abs(w)", ge=0, le=1000
    )
    l2: float = result(
        0.0, "adds l2 * w to the gradient of matrices, after clipping: the penalty l2 / 2 * w^2", ge=0, le=1000
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = result(
        "cosine", "after warm-up; wsd: stable, then decay"
    )
    warmup_steps: int = result(0, "linear warm-up from 0", ge=0, le=MOST_STEPS)
    decay_steps: int = result(0, "wsd: length of the final decay", ge=0, le=MOST_STEPS)
    final_lr_ratio: float = result(0.1, "learning rate at the last step, relative to the peak", ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _decay_is_meant(cls, given: Any) -> Any:
        """Decay of adam and sgd is 0 unless the config gives one: theirs passes through the gradient (L2). AdamW's and
        Muon's does not, so it has a default."""
        if isinstance(given, dict) and given.get("name") in ("adam", "sgd"):
            return {"weight_decay": 0.0, **given}
        return given

    @model_validator(mode="after")
    def _rates(self) -> OptimSection:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.schedule == "wsd" and not self.decay_steps:
            raise ValueError("schedule wsd needs decay_steps")
        return self
