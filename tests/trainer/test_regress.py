"""Regression: inputs and targets are normalised, and reported values are in the target's own units."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema.task import RegressSection
from tests.trainer.records import config_of, prepared_of, records
from trainer.data.batch import Batch, Row
from trainer.tasks import build_task
from trainer.tasks.base import named
from trainer.tasks.regress import Regression

TARGETS = [1000.0, 1021.0, 993.0, 1014.0, 1035.0]
TABLE = [{"age": 10 * n, "size": f"{n / 2}", "target": target} for n, target in enumerate(TARGETS)]


def ready(**section: Any) -> tuple[Regression, list[dict[str, np.ndarray]]]:
    task, given = Regression(RegressSection(**{"name": "regress", **section})), records(TABLE)
    facts = json.loads(json.dumps(task.survey(iter(given))))
    task.resolve(config_of("task={name: regress}"), prepared_of(facts))
    return task, [task.encode(record, facts) for record in given]


def batch_of(task: Regression, samples: list[dict[str, np.ndarray]], real: int | None = None) -> Batch:
    return task.collate(samples, len(samples) if real is None else real, [Row(0, 0, 0)] * len(samples))


def test_features_and_target_have_mean_0_and_deviation_1() -> None:
    task, samples = ready()
    batch = batch_of(task, samples)
    for name in ("features", "target"):
        values = batch.tensors[name]
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones_like(values[0]))


@pytest.mark.parametrize("normalise", [True, False])
def test_metrics_are_in_the_targets_own_units(normalise: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    task, samples = ready(normalise=normalise)
    targets = np.array([row["target"] for row in TABLE])
    guesses = targets + np.array([1.0, -2.0, 0.5, 4.0, -3.0])
    scale = targets.std() if normalise else 1.0
    answers = torch.tensor((guesses - targets.mean()) / scale if normalise else guesses, dtype=torch.float32)
    batch = batch_of(task, [*samples, samples[0]], real=5)
    model = lambda features: torch.cat((answers, torch.zeros(1)))[:, None].requires_grad_()  # noqa: E731
    total, columns = task.sums(model, batch)
    total.backward()
    found = task.metrics(named(task, columns.tolist(), task.weigh(batch)))
    assert list(found) == ["loss", "mse", "mae", "r2"]
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(targets, guesses), rel=1e-4)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(targets, guesses), rel=1e-4)
    assert found["r2"] == pytest.approx(metrics.r2_score(targets, guesses), rel=1e-4)
    assert found["loss"] == pytest.approx(found["mse"] / scale**2)
    assert total.item() == pytest.approx(5 * found["loss"], rel=1e-5)


def test_sums_do_not_depend_on_how_rows_fall() -> None:
    task, samples = ready()
    answers = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    _, whole = task.sums(lambda features: answers, batch_of(task, samples))
    first = task.sums(lambda features: answers[:3], batch_of(task, samples[:3]))[1]
    rest = task.sums(lambda features: answers[[3, 4, 4]], batch_of(task, [*samples[3:], samples[4]], real=2))[1]
    torch.testing.assert_close(first + rest, whole)


def test_the_data_decide_the_models_sizes() -> None:
    config = config_of("task={name: regress}")
    task = build_task(config)
    assert isinstance(task, Regression)
    prepared = prepared_of(task.survey(iter(records(TABLE))))
    resolved = task.resolve(config, prepared)
    assert (resolved.model.features, resolved.model.outputs) == (2, 1)
    batch, cost = task.example(resolved)
    assert (batch.tensors["features"].shape, cost) == ((1, 2), 1)
    with pytest.raises(UserError, match=r"model.outputs is 2, one target is predicted"):
        task.resolve(config_of("task={name: regress}", "model.outputs=2"), prepared)


def test_what_is_wrong_is_said_with_its_place() -> None:
    task = Regression(RegressSection(name="regress"))
    for change, message in (
        ({"target": "far"}, "a.csv, line 2: column 'target' holds 'far', a finite number was expected"),
        ({"size": ""}, "a.csv, line 2: column 'size' is empty"),
        ({"size": np.zeros((2, 2))}, "a.csv, line 2: column 'size' holds an image, a finite number was expected"),
    ):
        with pytest.raises(UserError) as error:
            task.survey(iter(records([{**TABLE[0], **change}, *TABLE[1:]])))
        assert str(error.value) == message
    with pytest.raises(UserError, match="there is no column beside 'target' to predict it from"):
        task.survey(iter(records([{"target": 1.0}])))


def test_a_mean_far_away_costs_no_digits() -> None:
    task = Regression(RegressSection(name="regress"))
    values = 1e9 + np.arange(1000.0)
    facts = task.survey(iter(records([{"x": v, "target": -v} for v in values])))
    assert facts["target_std"] == pytest.approx(values.std(), rel=1e-9)
    assert facts["mean"] == pytest.approx([values.mean()], rel=1e-15)


def test_faults() -> None:
    task, samples = ready()
    batch = batch_of(task, samples, real=3)
    assert task.fault(batch) is None
    batch.tensors["weight"][:] = 1
    assert task.fault(batch) == "a fill-up has a weight, or a sample has none"
    batch.tensors["target"][0] = torch.inf
    assert task.fault(batch) == "a feature or target is not finite"
