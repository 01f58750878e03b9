"""Metrics from sums alone: the sums add up over batches and ranks, and this is the last step. No torch.

Where a number has no meaning (the precision of a label that was never predicted) it is 0, as with scikit-learn's
`zero_division=0`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

# The metrics of `classification` where more is better.
RATES = ("accuracy", "precision", "recall", "f1", "precision_macro", "recall_macro", "f1_macro", "f1_micro")


def classification(confusion: np.ndarray) -> dict[str, float]:
    """Metrics of the counts of (labels, predictions), K x K.

    For two labels, `precision`, `recall` and `f1` are those of the second label. For more labels they are the macro
    values: means over the labels that occur as a label or a prediction. `majority` is the accuracy of always predicting
    the most frequent label.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    hits, total = np.diagonal(confusion), confusion.sum()
    of_label, of_prediction = confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = _ratio(hits, of_prediction), _ratio(hits, of_label)
    f1 = _ratio(2 * hits, of_label + of_prediction)
    occurs = of_label + of_prediction > 0

    def shown(values: np.ndarray) -> float:
        return float(values[1]) if len(confusion) == 2 else _mean(values[occurs])

    accuracy = float(_ratio(hits.sum(), total))
    return {
        "accuracy": accuracy,
        "precision": shown(precision),
        "recall": shown(recall),
        "f1": shown(f1),
        "precision_macro": _mean(precision[occurs]),
        "recall_macro": _mean(recall[occurs]),
        "f1_macro": _mean(f1[occurs]),
        "f1_micro": accuracy,  # with one label per row, a wrong prediction is one too many and one too few
        "majority": float(_ratio(of_label.max(), total)),
    }


def per_label(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """`precision`, `recall`, `f1` (K,) of each label, and `support`, its count of rows."""
    confusion = np.asarray(confusion, dtype=np.float64)
    hits, support, predicted = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = _ratio(2 * hits, support + predicted)
    return {"precision": _ratio(hits, predicted), "recall": _ratio(hits, support), "f1": f1, "support": support}


def regression(sums: Mapping[str, float], scale: float = 1.0) -> dict[str, float]:
    """`mse`, `mae` and `r2` (NaN of less than two rows), from sums over rows: `count`, `absolute` and `squared` errors,
    `target`, `target_squared`.

    Targets have the mean of the training targets subtracted, in units of `scale`, so that the variance loses no digits.
    The results are in the target's own units. If all targets are equal, r2 is 1 when they are predicted exactly, else
    0.
    """
    count, squared = sums["count"], sums["squared"]
    found = {"mse": squared / count * scale**2, "mae": sums["absolute"] / count * scale}
    spread = sums["target_squared"] - sums["target"] ** 2 / count
    if count < 2:
        found["r2"] = math.nan
    elif spread <= 1e-13 * sums["target_squared"]:  # the rounding error where all targets are equal
        found["r2"] = 1.0 if squared == 0 else 0.0
    else:
        found["r2"] = 1.0 - squared / spread
    return found


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where below is 0."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) != 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
