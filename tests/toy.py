"""A user's own task and model: predict the difference of two numbers, with an absolute error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from configs.config import Config
from models import Model
from trainer.data.batch import Batch, Row
from trainer.data.prepared import Prepared
from trainer.data.records import Record
from trainer.data.samples import Columns
from trainer.tasks.base import Better
from trainer.tasks.records import OfRecords, number_of


class Difference(OfRecords):
    columns: tuple[str, ...] = ("loss", "near")
    better: Mapping[str, Better] = {"loss": "min", "near": "max"}

    def about(self) -> dict[str, Any]:
        return {"task": "difference"}

    def survey(self, records: Iterator[Record]) -> dict[str, Any]:
        return {"largest": max(max(abs(number_of(record, key)) for key in "ab") for record in records)}

    def encode(self, record: Record, facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
        a, b = (number_of(record, key) / facts["largest"] for key in "ab")
        return {"pair": np.array([a, b], np.float32), "target": np.array([a - b], np.float32)}

    def resolve(self, config: Config, prepared: Prepared) -> Config:
        return config

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        tensors = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in ("pair", "target")}
        return Batch({**tensors, "weight": (torch.arange(len(samples)) < real).float()}, real)

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        errors = (model(batch.tensors["pair"]).float() - batch.tensors["target"]).abs()[:, 0] * batch.tensors["weight"]
        near = ((errors < 0.1) & (batch.tensors["weight"] > 0)).sum()
        return errors.sum(), torch.stack([errors.detach().double().sum(), near.double()])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {key: sums[key] / sums["weight"] for key in ("loss", "near")}

    def example(self, config: Config) -> tuple[Batch, int]:
        return Batch({"pair": torch.zeros(1, 2, device="meta"), "weight": torch.ones(1)}, 1), 1

    def fault(self, batch: Batch) -> str | None:
        return None


class Net(BaseModel):
    width: int = 8


def build(section: Net) -> Model:
    module = nn.Sequential(nn.Linear(2, section.width), nn.Tanh(), nn.Linear(section.width, 1))

    def initialise(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, 0.5, generator=generator) if name.endswith("weight") else tensor.zero_()

    flops = 6 * sum(parameter.numel() for parameter in module.parameters())
    return Model(
        module=module,
        blocks=[module[0], module[2]],
        units=[[module[0]], [module[2]]],
        initialise=initialise,
        flops=lambda tensors: float(flops * len(tensors["pair"])),
        matrices=lambda name, dims: dims == 2,
    )
