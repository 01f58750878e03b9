"""Metrics from sums equal those that scikit-learn computes from rows."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.tasks.counting import classification, per_label, regression

metrics = pytest.importorskip("sklearn.metrics")


def confusion_of(labels: list[int], predictions: list[int], classes: int) -> np.ndarray:
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, predictions), 1)
    return counts


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Also with labels that nobody has or predicts, and with one label for all."""
    classes = draw(st.integers(2, 6))
    some = st.sampled_from(sorted(draw(st.sets(st.integers(0, classes - 1), min_size=1))))
    count = draw(st.integers(1, 40))
    labels = draw(st.lists(some, min_size=count, max_size=count))
    return classes, labels, draw(st.lists(st.integers(0, classes - 1) | some, min_size=count, max_size=count))


@given(rows())
def test_classification_is_scikit_learns(drawn: tuple[int, list[int], list[int]]) -> None:
    classes, labels, predictions = drawn
    found = classification(confusion_of(labels, predictions, classes))
    each = per_label(confusion_of(labels, predictions, classes))
    expected = {
        "accuracy": metrics.accuracy_score(labels, predictions),
        "f1_micro": metrics.f1_score(labels, predictions, average="micro", zero_division=0),
        "majority": max(labels.count(k) for k in range(classes)) / len(labels),
    }
    for name in ("precision", "recall", "f1"):
        score = getattr(metrics, f"{name}_score")
        expected[f"{name}_macro"] = score(labels, predictions, average="macro", zero_division=0)
        of_label = score(labels, predictions, average=None, labels=range(classes), zero_division=0)
        expected[name] = of_label[1] if classes == 2 else expected[f"{name}_macro"]
        np.testing.assert_allclose(each[name], of_label, rtol=0, atol=1e-12)
    assert found == pytest.approx(expected, rel=0, abs=1e-12)
    assert each["support"].tolist() == [labels.count(k) for k in range(classes)]


def sums_of(targets: np.ndarray, predictions: np.ndarray, mean: float, scale: float) -> dict[str, float]:
    """Sums as the task makes them, in normalised units."""
    target, error = (targets - mean) / scale, (predictions - targets) / scale
    return {
        "count": float(len(targets)),
        "absolute": float(np.abs(error).sum()),
        "squared": float((error**2).sum()),
        "target": float(target.sum()),
        "target_squared": float((target**2).sum()),
    }


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.sampled_from([0.0, 1e-3, 1.0, 3.0]), st.floats(0, 2))
def test_regression_is_scikit_learns(seed: int, count: int, noise: float, far: float) -> None:
    draw = np.random.default_rng(seed)
    targets = 1000 + 7 * draw.standard_normal(count)
    predictions = targets + noise * draw.standard_normal(count)
    found = regression(sums_of(targets, predictions, 1000 + far, 7.5), 7.5)
    assert found == pytest.approx(
        {
            "mse": metrics.mean_squared_error(targets, predictions),
            "mae": metrics.mean_absolute_error(targets, predictions),
            "r2": metrics.r2_score(targets, predictions),
        },
        rel=1e-11,
        abs=1e-12,
    )


def test_targets_that_are_all_alike() -> None:
    targets = np.full(7, 1000.5)  # their mean is exact
    for predictions in (targets, targets + 1):
        found = regression(sums_of(targets, predictions, 3.0, 2.0), 2.0)["r2"]
        assert found == metrics.r2_score(targets, predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = regression(sums_of(targets[:1], targets[:1] + 2, 0.0, 1.0))
        assert found == pytest.approx({"mse": 4.0, "mae": 2.0, "r2": math.nan}, nan_ok=True)
        assert classification(np.zeros((2, 2)))["accuracy"] == 0.0


def test_far_from_zero_no_digits_are_lost() -> None:
    """Sums around the training mean: sums of squares of the targets themselves would lose all digits of r2."""
    draw = np.random.default_rng(0)
    targets = 1e9 + draw.standard_normal(1000)
    predictions = targets + 0.5 * draw.standard_normal(1000)
    found = regression(sums_of(targets, predictions, float(targets.mean()), 1.0))
    assert found["r2"] == pytest.approx(metrics.r2_score(targets, predictions), abs=1e-12)
