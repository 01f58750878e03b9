"""Regression: a number for each record, from columns of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from configs.config import Config
from configs.schema.task import RegressSection
from trainer.data.batch import Batch, Row
from trainer.data.prepare_records import Facts
from trainer.data.prepared import Prepared
from trainer.data.records import Record
from trainer.data.samples import Columns
from trainer.tasks.base import Better
from trainer.tasks.counting import regression
from trainer.tasks.records import (
    Moments,
    OfRecords,
    chained,
    facts_of,
    feature_columns,
    features_of,
    number_of,
    numbers_of,
    sized,
)

_SUMS = ("absolute", "target", "target_squared")  # beside the loss, which is the squared errors


class Regression(OfRecords):
    """Sums: squared errors in the units of training, and the other sums that MSE, MAE and R2 need.

    Targets in samples always have the mean of the training targets subtracted. Without `task.normalise` the mean is
    added again where the loss is computed.
    """

    columns: tuple[str, ...] = ("loss", *_SUMS)

    better: Mapping[str, Better] = {"loss": "min", "mse": "min", "mae": "min", "r2": "max"}

    def __init__(self, section: RegressSection) -> None:
        self.section = section
        self._shift, self._scale = 0.0, 1.0  # a target is scale * (its number in samples) + mean; set by `resolve`

    # ---- samples

    def about(self) -> dict[str, Any]:
        section = self.section
        return {
            "task": "regress",
            "target": section.target,
            "features": section.features,
            "normalise": section.normalise,
        }

    def survey(self, records: Iterator[Record]) -> Facts:
        """`features`, `mean` and `std` of each, `target_mean`, `target_std`."""
        first = next(records)
        columns = feature_columns(self.section.features, self.section.target, first)
        moments = Moments(len(columns) + 1)
        for record in chained(first, records):
            moments.add(np.append(numbers_of(record, columns), number_of(record, self.section.target)))
        mean, std = moments.mean.tolist(), moments.std.tolist()
        if not self.section.normalise:
            mean, std = [*(0.0 for _ in columns), mean[-1]], [1.0 for _ in mean]
        facts: Facts = {"features": columns, "mean": mean[:-1], "std": std[:-1]}
        return {**facts, "target_mean": mean[-1], "target_std": std[-1]}

    def encode(self, record: Record, facts: Facts) -> dict[str, np.ndarray]:
        """`features` (F,) fp32 and `target` () fp64, both normalised by the values of the training records."""
        numbers = numbers_of(record, facts["features"])
        target = (number_of(record, self.section.target) - facts["target_mean"]) / facts["target_std"]
        features = ((numbers - facts["mean"]) / facts["std"]).astype(np.float32)
        return {"features": features, "target": np.array(target, dtype=np.float64)}

    # ---- batches

    def resolve(self, config: Config, prepared: Prepared) -> Config:
        facts = facts_of(prepared)
        self._scale = float(facts["target_std"])
        self._shift = 0.0 if self.section.normalise else float(facts["target_mean"])
        return sized(config, len(facts["features"]), 1, "one target is predicted")

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        """`features` (rows, F), `target` (rows,) and `weight` (rows,) fp32."""
        features = torch.from_numpy(np.stack([s["features"] for s in samples]))
        target = torch.from_numpy(np.stack([s["target"] for s in samples])).float()
        weight = torch.ones(len(samples))
        weight[real:] = 0.0
        return Batch({"features": features, "target": target, "weight": weight}, real)

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        target, weight = batch.tensors["target"], batch.tensors["weight"]
        errors = model(batch.tensors["features"]).float().squeeze(1) - (target + self._shift)
        total = (errors.square() * weight).sum()
        with torch.no_grad():
            error, target, weight = errors.double(), target.double(), weight.double()
            rows = torch.stack((error.square(), error.abs(), target, target.square()))
            return total, (rows * weight).sum(dim=1)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        count, squared = sums["weight"], sums["loss"]
        return {"loss": squared / count, **regression({**sums, "count": count, "squared": squared}, self._scale)}

    def example(self, config: Config) -> tuple[Batch, int]:
        with torch.device("meta"):
            features = torch.zeros(1, features_of(config))
            return Batch({"features": features, "target": torch.zeros(1), "weight": torch.ones(1)}, 1), 1

    def fault(self, batch: Batch) -> str | None:
        if not all(bool(torch.isfinite(batch.tensors[name]).all()) for name in ("features", "target")):
            return "a feature or target is not finite"
        weight = batch.tensors["weight"]
        return "a fill-up has a weight, or a sample has none" if (weight > 0).sum() != batch.rows else None
