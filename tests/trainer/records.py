"""Made-up records and prepared facts for tests of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.config import Config
from configs.load import load
from trainer.data.prepared import Prepared
from trainer.data.records import Record

SOURCE = "data.sources=[{name: a, kind: csv, path: a.csv}]"


def records(rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Records as from the lines of a table, which begin below its header."""
    return [Record(str(n).encode(), f"a.csv, line {n}", dict(row)) for n, row in enumerate(rows, start=2)]


def config_of(*overrides: str) -> Config:
    base = ["model={name: mlp}", SOURCE, "data.seq_len=null"]
    return load("demo", [*base, *overrides])


def prepared_of(facts: Mapping[str, Any]) -> Prepared:
    """Facts in the form in which a start reads them."""
    prepared = Prepared.__new__(Prepared)
    prepared.sources, prepared.facts = [], {"facts": json.loads(json.dumps(dict(facts)))}
    return prepared


def scores(*rows: Sequence[float]) -> Any:
    """A model that gives these answers in fp32, whatever its input."""
    import torch

    answer = torch.tensor(np.array(rows), dtype=torch.float32, requires_grad=True)
    return lambda features: answer[: len(features)]
