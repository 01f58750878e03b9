"""Classification: labels and features of records, sums that do not depend on rows' places, metrics of splits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from configs.errors import UserError
from configs.schema.task import ClassifySection
from models import build_model
from tests.trainer.records import config_of, prepared_of, records, scores
from trainer.data.batch import Batch, Row
from trainer.tasks import build_task
from trainer.tasks.base import named
from trainer.tasks.classify import Classification

TABLE = [
    {"age": "10", "weight": "1.5", "label": "b"},
    {"age": "20", "weight": "2.5", "label": "a"},
    {"age": "30", "weight": "3.5", "label": "b"},
    {"age": "40", "weight": "4.5", "label": "b"},
]


def task_of(**section: Any) -> Classification:
    return Classification(ClassifySection(**{"name": "classify", **section}))


def ready(rows: list[dict[str, Any]], **section: Any) -> tuple[Classification, list[dict[str, np.ndarray]]]:
    """A resolved task, and the samples of these training records."""
    task, given = task_of(**section), records(rows)
    facts = json.loads(json.dumps(task.survey(iter(given))))
    task.resolve(config_of("task={name: classify}"), prepared_of(facts))
    return task, [task.encode(record, facts) for record in given]


def batch_of(task: Classification, samples: list[dict[str, np.ndarray]], real: int | None = None) -> Batch:
    return task.collate(samples, len(samples) if real is None else real, [Row(0, 0, 0)] * len(samples))


def test_facts_of_a_table() -> None:
    facts = task_of().survey(iter(records(TABLE)))
    assert facts["labels"] == ["a", "b"]
    assert facts["counts"] == [1, 3]
    assert facts["features"] == ["age", "weight"]
    assert facts["mean"] == pytest.approx([25, 3])
    assert facts["std"] == pytest.approx([np.std([10, 20, 30, 40]), np.std([1.5, 2.5, 3.5, 4.5])])
    numbered = task_of().survey(iter(records([{"x": "1", "label": n} for n in ("10", "9", "9")])))
    assert numbered["labels"] == ["9", "10"]
    mixed = task_of().survey(iter(records([{"x": 1, "label": n} for n in (3, "3", 3.0, 2)])))
    assert (mixed["labels"], mixed["counts"]) == (["2", "3"], [1, 3])


def test_features_have_mean_0_and_deviation_1() -> None:
    _, samples = ready(TABLE)
    features = np.stack([s["features"] for s in samples])
    assert features.dtype == np.float32
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-6)
    assert [int(s["label"]) for s in samples] == [1, 0, 1, 1]
    _, alike = ready([{**row, "age": "7"} for row in TABLE])
    assert {float(s["features"][0]) for s in alike} == {0.0}
    _, chosen = ready(TABLE, features=["weight"])
    assert chosen[0]["features"].shape == (1,)


def test_images_are_flattened_and_scaled_by_the_largest_value() -> None:
    images = [np.full((2, 3), value, dtype=np.uint8) for value in (0, 8, 16)]
    task, samples = ready([{"image": image, "label": n % 2} for n, image in enumerate(images)])
    assert samples[0]["features"].dtype == np.uint8
    features = batch_of(task, samples).tensors["features"]
    assert features.dtype == torch.float32
    assert features.tolist() == [[0.0] * 6, [0.5] * 6, [1.0] * 6]
    facts = task.survey(iter(records([{"image": image, "label": n} for n, image in enumerate(images)])))
    assert (facts["image"], facts["shape"], facts["scale"]) == ("image", [2, 3], 16.0)
    (other,) = records([{"image": np.zeros((4, 4), np.uint8), "label": 0}])
    with pytest.raises(UserError, match=r"a.csv, line 2: the image is 4 x 4, those before it are 2 x 3"):
        task.encode(other, facts)


@pytest.mark.parametrize(
    ("change", "section", "message"),
    [
        ({"label": ""}, {}, "a.csv, line 3: column 'label' is empty"),
        ({"age": None}, {}, "a.csv, line 3: column 'age' is empty"),
        ({"age": "old"}, {}, "a.csv, line 3: column 'age' holds 'old', a finite number was expected"),
        ({"age": "nan"}, {}, "a.csv, line 3: column 'age' holds 'nan', a finite number was expected"),
        ({}, {"label": "lable"}, "a.csv, line 2: there is no column 'lable'; did you mean 'label'?"),
        ({}, {"label": "zzz"}, "a.csv, line 2: there is no column 'zzz'; there are age, weight, label"),
        ({}, {"features": ["agee"]}, "a.csv, line 2: there is no column 'agee'; did you mean 'age'?"),
        ({}, {"features": ["label"]}, "task.features holds 'label', the column that is to be predicted"),
        ({}, {"image": "age"}, "a.csv, line 2: column 'age' holds '10', an image was expected"),
        ({}, {"image": "age", "features": ["age"]}, "task.features and task.image exclude each other"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change: dict[str, Any], section: dict[str, Any], message: str) -> None:
    rows = [TABLE[0], {**TABLE[1], **change}, *TABLE[2:]]
    with pytest.raises(UserError) as error:
        task_of(**section).survey(iter(records(rows)))
    assert str(error.value).startswith(message)


def test_labels_that_cannot_be_learned() -> None:
    with pytest.raises(UserError, match="all 3 training records have the label 'b'"):
        task_of().survey(iter(records([TABLE[0]] * 3)))
    with pytest.raises(UserError, match=r"1,001 labels, such as '0'; 1,000 are the most"):
        task_of().survey(iter(records([{"x": n, "label": n} for n in range(1001)])))
    facts = task_of().survey(iter(records(TABLE)))
    (unknown,) = records([{**TABLE[0], "label": "c"}])
    with pytest.raises(UserError) as error:
        task_of().encode(unknown, facts)
    assert str(error.value) == (
        "a.csv, line 2: the label 'c' stands in held-out records, in no training record\ntraining records have a, b"
    )


def test_the_data_decide_the_models_sizes() -> None:
    facts = task_of().survey(iter(records(TABLE)))
    config = config_of("task={name: classify}")
    task = build_task(config)
    assert isinstance(task, Classification)
    resolved = task.resolve(config, prepared_of(facts))
    assert (resolved.model.features, resolved.model.outputs) == (2, 2)
    assert task.resolve(resolved, prepared_of(facts)) == resolved
    batch, cost = task.example(resolved)
    assert (batch.tensors["features"].shape, cost) == ((1, 2), 1)
    assert build_model(resolved.model).module(torch.zeros(3, 2)).shape == (3, 2)
    for override, message in (
        ("model.outputs=10", r"model.outputs is 10, the data have 2 labels \(a, b\)"),
        ("model.features=3", "model.features is 3, the data have 2"),
    ):
        with pytest.raises(UserError, match=message):
            task.resolve(config_of("task={name: classify}", override), prepared_of(facts))


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_sums_are_cross_entropy_and_counts(class_weights: str, label_smoothing: float) -> None:
    task, samples = ready(TABLE, class_weights=class_weights, label_smoothing=label_smoothing)
    logits = [[2.0, 1.0], [0.5, 0.0], [-1.0, 3.0], [0.0, -0.5], [9.0, 9.5]]
    batch = batch_of(task, [*samples, samples[0]], real=4)
    assert batch.rows == 4
    assert task.fault(batch) is None
    total, columns = task.sums(scores(*logits), batch)
    weights = torch.tensor([2.0, 2 / 3]) if class_weights == "balanced" else torch.ones(2)
    label = torch.tensor([1, 0, 1, 1])
    # With smoothed targets, torch's own weighting weighs each target's class. Ours weighs rows.
    losses = F.cross_entropy(torch.tensor(logits[:4]), label, reduction="none", label_smoothing=label_smoothing)
    assert total.item() == pytest.approx(float((losses * weights[label]).sum()), rel=1e-6)
    assert columns.dtype == torch.float64
    assert columns.tolist() == pytest.approx([total.item(), 1, 0, 2, 1], rel=1e-6)
    assert task.weigh(batch) == pytest.approx((float(weights[label].sum()),))
    total.backward()
    found = task.metrics(named(task, columns.tolist(), task.weigh(batch)))
    assert next(iter(found)) == "loss"
    assert found["loss"] == pytest.approx(total.item() / float(weights[label].sum()), rel=1e-6)
    assert (found["accuracy"], found["recall"], found["precision"]) == (0.5, pytest.approx(1 / 3), 1.0)


def test_sums_do_not_depend_on_how_rows_fall() -> None:
    task, samples = ready(TABLE, class_weights="balanced")
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    _, whole = task.sums(lambda features: logits, batch_of(task, samples))
    first = task.sums(lambda features: logits[:3], batch_of(task, samples[:3]))[1]
    # Two ranks of three rows: the second one fills up with its own row.
    rest = task.sums(lambda features: logits[[3, 3, 3]], batch_of(task, [samples[3]] * 3, real=1))[1]
    torch.testing.assert_close(first + rest, whole)
    assert task.weigh(batch_of(task, samples[:3])) + task.weigh(batch_of(task, [samples[3]] * 3, real=0))
    assert task.weigh(batch_of(task, [samples[3]] * 3, real=0)) == (0.0,)


def test_balanced_labels_weigh_the_same_in_all() -> None:
    task, samples = ready(TABLE, class_weights="balanced")
    weight, label = (batch_of(task, samples).tensors[name] for name in ("weight", "label"))
    assert float(weight[label == 0].sum()) == pytest.approx(float(weight[label == 1].sum()))
    assert float(weight.sum()) == pytest.approx(4)


def test_faults() -> None:
    task, samples = ready(TABLE)
    for name, value, fault in (
        ("features", torch.full((4, 2), torch.nan), "a feature is not finite"),
        ("label", torch.full((4,), 2), "a sample has a label beyond those of the data"),
        ("weight", torch.zeros(4), "a fill-up has a weight, or a sample has none"),
    ):
        batch = batch_of(task, samples)
        batch.tensors[name] = value
        assert task.fault(batch) == fault
