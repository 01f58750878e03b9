"""Classification: one of several labels for each record, from columns of numbers or from an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from configs.config import Config
from configs.errors import UserError
from configs.schema.task import ClassifySection
from trainer.data.batch import Batch, Row
from trainer.data.prepare_records import Facts
from trainer.data.prepared import Prepared
from trainer.data.records import Record
from trainer.data.samples import Columns
from trainer.tasks.base import Better
from trainer.tasks.counting import RATES, classification
from trainer.tasks.records import (
    Moments,
    OfRecords,
    chained,
    facts_of,
    feature_columns,
    features_of,
    numbers_of,
    sized,
    value_of,
)

MOST_LABELS = 1000  # all ranks add one sum per pair of labels in each step


class Classification(OfRecords):
    """Sums: the cross-entropy times a row's weight, and a count for each pair of label and prediction.

    Numbers of tables are scaled to mean 0 and deviation 1 over the training records. Images are divided by the largest
    value of the training images.
    """

    better: Mapping[str, Better] = {"loss": "min", **dict.fromkeys(RATES, "max")}

    def __init__(self, section: ClassifySection) -> None:
        self.section = section
        self.labels: list[str] = []  # `resolve` sets the labels and the sums
        self.columns: tuple[str, ...] = ("loss",)
        self._class_weights = torch.ones(0)
        self._scale = 1.0  # of images; 1 where numbers are already scaled

    # ---- samples

    def about(self) -> dict[str, Any]:
        section = self.section
        return {"task": "classify", "label": section.label, "features": section.features, "image": section.image}

    def survey(self, records: Iterator[Record]) -> Facts:
        """`labels`, and `counts` of each. Of a table `features`, `mean`, `std`; of images `image`, `shape`, `scale`."""
        first = next(records)
        image = self._image_of(first)
        columns = [] if image else feature_columns(self.section.features, self.section.label, first)
        moments, largest, counts = Moments(len(columns)), 0.0, Counter[str]()
        for record in chained(first, records):
            counts[label_of(record, self.section.label)] += 1
            if image:
                largest = max(largest, float(np.max(_pixels(record, image))))
            else:
                moments.add(numbers_of(record, columns))
        labels = sorted(counts, key=_order(counts))
        if len(labels) == 1:
            raise UserError(
                f"all {counts.total():,} training records have the {self.section.label} {labels[0]!r}\n"
                "there is nothing to tell apart: add records of another, or name another column as task.label"
            )
        if len(labels) > MOST_LABELS:
            raise UserError(
                f"column {self.section.label!r} holds {len(labels):,} labels, such as {labels[0]!r}; "
                f"{MOST_LABELS:,} are the most\n"
                "name another column as task.label; numbers are predicted by task.name=regress"
            )
        facts: Facts = {"labels": labels, "counts": [counts[label] for label in labels]}
        if image:
            return {**facts, "image": image, "shape": list(_pixels(first, image).shape), "scale": largest or 1.0}
        return {**facts, "features": columns, "mean": moments.mean.tolist(), "std": moments.std.tolist()}

    def encode(self, record: Record, facts: Facts) -> dict[str, np.ndarray]:
        """`features` (F,), fp32 from a table or unscaled from an image, and `label` () int64."""
        label, labels = label_of(record, self.section.label), facts["labels"]
        if label not in labels:
            raise UserError(
                f"{record.place}: the {self.section.label} {label!r} stands in held-out records, in no training "
                f"record\ntraining records have {_listed(labels)}"
            )
        if "image" in facts:
            pixels = _pixels(record, facts["image"])
            if list(pixels.shape) != facts["shape"]:
                sizes = [" x ".join(map(str, shape)) for shape in (pixels.shape, facts["shape"])]
                raise UserError(f"{record.place}: the image is {sizes[0]}, those before it are {sizes[1]}")
            features = pixels.reshape(-1)
        else:
            numbers = numbers_of(record, facts["features"])
            features = ((numbers - facts["mean"]) / facts["std"]).astype(np.float32)
        return {"features": features, "label": np.array(labels.index(label), dtype=np.int64)}

    def _image_of(self, first: Record) -> str | None:
        """The column with the image, where the input is an image."""
        name = self.section.image
        if name is None and not self.section.features and isinstance(first.values.get("image"), np.ndarray):
            return "image"
        if name is not None and self.section.features:
            raise UserError("task.features and task.image exclude each other: give one of them")
        return name

    # ---- batches

    def resolve(self, config: Config, prepared: Prepared) -> Config:
        facts = facts_of(prepared)
        self.labels, counts = list(facts["labels"]), np.array(facts["counts"], dtype=np.float64)
        classes = len(self.labels)
        self.columns = ("loss", *_pairs(classes))
        balanced = counts.sum() / (classes * counts)  # each label then weighs the same over all training records
        chosen = balanced if self.section.class_weights == "balanced" else np.ones(classes)
        self._class_weights = torch.from_numpy(chosen).float()
        self._scale = float(facts.get("scale", 1.0))
        features = int(np.prod(facts["shape"])) if "image" in facts else len(facts["features"])
        return sized(config, features, classes, f"the data have {classes} labels ({_listed(self.labels)})")

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        """`features` (rows, F) and `weight` (rows,) fp32, `label` (rows,) int64."""
        features = torch.from_numpy(np.stack([s["features"] for s in samples])).float() / self._scale
        label = torch.from_numpy(np.stack([s["label"] for s in samples]))
        weight = self._class_weights[label]
        weight[real:] = 0.0
        return Batch({"features": features, "label": label, "weight": weight}, real)

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        label, weight = batch.tensors["label"], batch.tensors["weight"]
        logits = model(batch.tensors["features"]).float()
        losses = F.cross_entropy(logits, label, reduction="none", label_smoothing=self.section.label_smoothing) * weight
        with torch.no_grad():
            classes = logits.shape[1]
            pairs = label * classes + logits.argmax(dim=1)
            counted = (weight > 0).double()
            counts = counted.new_zeros(classes * classes).scatter_add_(0, pairs, counted)
            columns = torch.cat((losses.double().sum().reshape(1), counts))
        return losses.sum(), columns

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        classes = len(self.labels)
        confusion = np.array([sums[name] for name in _pairs(classes)]).reshape(classes, classes)
        return {"loss": sums["loss"] / sums["weight"], **classification(confusion)}

    def example(self, config: Config) -> tuple[Batch, int]:
        with torch.device("meta"):
            features, label = torch.zeros(1, features_of(config)), torch.zeros(1, dtype=torch.int64)
            return Batch({"features": features, "label": label, "weight": torch.ones(1)}, 1), 1

    def fault(self, batch: Batch) -> str | None:
        if not bool(torch.isfinite(batch.tensors["features"]).all()):
            return "a feature is not finite"
        label = batch.tensors["label"]
        if not bool(((label >= 0) & (label < len(self.labels))).all()):
            return "a sample has a label beyond those of the data"
        weight = batch.tensors["weight"]
        return "a fill-up has a weight, or a sample has none" if (weight > 0).sum() != batch.rows else None


def label_of(record: Record, column: str) -> str:
    """A label as text, so that 3 in one file equals 3 in another. Raises UserError where there is none."""
    value = value_of(record, column)
    if isinstance(value, np.ndarray):
        raise UserError(f"{record.place}: column {column!r} holds an image, a label was expected")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _pairs(classes: int) -> list[str]:
    """Names of the columns that count samples by (label, predicted label)."""
    return [f"count {i}.{j}" for i in range(classes) for j in range(classes)]


def _order(labels: Mapping[str, int]) -> Callable[[str], Any]:
    """The order of labels: whole numbers by their value, all others as text."""
    try:
        numbers = {label: int(label) for label in labels}
    except ValueError:
        return str
    return lambda label: (numbers[label], label)


def _pixels(record: Record, column: str) -> np.ndarray:
    value = value_of(record, column)
    if not isinstance(value, np.ndarray):
        raise UserError(f"{record.place}: column {column!r} holds {value!r}, an image was expected")
    if not value.size:
        raise UserError(f"{record.place}: the image has no pixels")
    return value


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
