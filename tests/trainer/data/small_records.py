"""Small tables, and tasks that make samples of them, for the tests of prepare_records.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.config import Config
from configs.errors import UserError
from configs.schema.data import DataSection
from trainer.data import files
from trainer.data import prepare_records as module
from trainer.data.columns import ColumnSamples, open_columns
from trainer.data.prepare_records import Facts, prepare_records
from trainer.data.records import Record, digest_of

Splits = dict[str, ColumnSamples]


def nothing(line: str) -> None:
    pass


class Table:
    """Columns of numbers minus the mean of the training records, and the index of the label among theirs."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.surveyed: list[str] = []

    def about(self) -> dict[str, Any]:
        return {"scale": self.scale, "columns": ("x", "y")}

    def survey(self, records: Iterator[Record]) -> Facts:
        count, total, labels = 0, 0.0, set()
        for record in records:
            count, total = count + 1, total + float(record.values["x"])
            labels.add(str(record.values["label"]))
            self.surveyed.append(record.place)
        return {"mean": total / count, "labels": sorted(labels)}

    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
        label = str(record.values["label"])
        if label not in facts["labels"]:
            raise UserError(f"{record.place}: the label {label!r} is not among the training records")
        x = (float(record.values["x"]) - facts["mean"]) * self.scale
        return {
            "x": np.array([x, float(record.values["y"])], np.float32),
            "text": np.frombuffer(label.encode(), np.uint8),
            "label": np.array(facts["labels"].index(label)),
        }


class Images:
    """Needs no survey, and reads no record in it."""

    def about(self) -> dict[str, Any]:
        return {}

    def survey(self, records: Iterator[Record]) -> Facts:
        return {}

    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
        return {"image": np.asarray(record.values["image"]), "label": np.array(record.values["label"])}


class NoWork(Table):
    def survey(self, records: Iterator[Record]) -> Facts:
        raise AssertionError("surveyed again")

    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
        raise AssertionError("encoded again")


def config(*sources: dict[str, Any], validate: int = 0, **data: Any) -> Config:
    """A config with the data section of a task of records. Its task and model are those of language modelling."""
    raw = {
        "model": {"vocab_size": 300, "dim": 8, "layers": 1, "heads": 1, "mlp_dim": 8, "max_seq_len": 64},
        "data": {"seq_len": 8, "sources": [{"name": "documents", "path": "x"}]},
        "train": {"steps": 5, "global_batch": 8, "micro_batch": 2, "validate_every_steps": validate},
    }
    section = {"seq_len": 8, "validation_fraction": 0.2, "test_fraction": 0.1, "sources": list(sources), **data}
    return Config.model_validate(raw).model_copy(update={"data": DataSection.model_validate(section)})


def line(i: int) -> str:
    return f"{i},{i / 4},{'a' * (i % 3 + 1)}"


def table(path: Path, rows: Iterator[int] | range = range(60)) -> dict[str, Any]:
    path.write_text("\n".join(["x,y,label", *map(line, rows)]) + "\n")
    return {"name": path.stem, "kind": "csv", "path": str(path)}


def prepare(cache: Path, cfg: Config, task: Any = None, say: Callable[[str], None] = nothing) -> Path:
    return prepare_records(cfg, task or Table(), cache, say, lambda: False)


def folders(index: Path) -> list[Path]:
    return [index.parent / source["folder"] for source in files.read_json(index)["sources"]]


def splits(index: Path) -> list[Splits]:
    return [open_columns(folder, files.read_json(folder / "meta.json")) for folder in folders(index)]


def fingerprints(index: Path) -> list[str]:
    return [files.read_json(folder / "meta.json")["fingerprint"] for folder in folders(index)]


def held(samples: ColumnSamples, mean: float = 0.0) -> list[int]:
    """The number of each row that the samples hold, from its y."""
    return [round(4 * float(samples.read(i)["x"][1])) for i in range(len(samples))]


def record(i: int, label: str | None = None) -> Record:
    values = {"x": str(i), "y": str(i / 4), "label": label or line(i).split(",")[2]}
    return Record(digest_of(values), "", values)


def refused(act: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(UserError) as error:
        act()
    assert 1 <= len(str(error.value).splitlines()) <= 2
    assert [part for part in parts if part not in str(error.value)] == []


def refuse_to_read(monkeypatch: pytest.MonkeyPatch, hashing: bool = True) -> None:
    def read(*args: Any) -> None:
        raise AssertionError("a file was read again")

    monkeypatch.setattr(module, "read_records", read)
    if hashing:
        monkeypatch.setattr(module, "hash_file", read)
        monkeypatch.setattr("trainer.data.cached.hash_file", read)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
