"""Classification and regression: metrics equal scikit-learn's at any number of ranks, and the presets learn."""

from __future__ import annotations

# Only tests import scikit-learn: ranks import this file too, and do not need it.
import csv
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks, tiny, train

from configs.config import Config
from configs.fingerprint import to_dict
from configs.load import load

GLOBAL_BATCH = 7
SIZES = (1, GLOBAL_BATCH - 1, GLOBAL_BATCH + 1, 40)  # of the validation set


def later(value: Any) -> Any:
    """A parameter that runs only with `--full`."""
    return pytest.param(value, marks=pytest.mark.full)


RATES = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_micro")


def table(path: Path, labels: int) -> Path:
    """Write rows of three numbers, a label that is hard to predict, and a number that is easy to predict."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["x", "y", "z", "label", "target"])
        for _ in range(400):
            x, y, z = (draw.gauss(0, 1) for _ in range(3))
            out.writerow([x, y, z, f"class {int(abs(x + y + draw.gauss(0, 1)) * labels / 3) % labels}", 50 + 9 * x - z])
    return path


def config(folder: Path, task: dict[str, Any], labels: int = 3, **changes: Any) -> dict[str, Any]:
    made = tiny(folder)
    made["model"], made["task"] = {"name": "mlp", "hidden": [8]}, {"features": ["x", "y", "z"], **task}
    source = {"name": "table", "kind": "csv", "path": str(table(folder / "table.csv", labels))}
    made["data"] = {"sources": [source], "validation_fraction": 0.3, "cache": str(folder / "cache")}
    made["train"] = {"steps": 4, "global_batch": GLOBAL_BATCH, "micro_batch": 2}
    return {**made, **changes}


def measure(made: dict[str, Any]) -> list[tuple[dict[str, float], np.ndarray, np.ndarray]]:
    """On each rank: a few steps, then for each size our metrics and the model's outputs, sample by sample."""
    from trainer.agreement import Agreement
    from trainer.data.batch import Row
    from trainer.data.loader import HeldOut, held_out
    from trainer.life.stop import StopWish
    from trainer.run import Run
    from trainer.start import start
    from trainer.validation import validate

    found: list[tuple[dict[str, float], np.ndarray, np.ndarray]] = []

    class Measured(Run):
        def save_now(self) -> None:
            agreement = Agreement(self.world, self.wish, lambda: False)
            for size in SIZES:
                chosen = held_out(self.prepared, "validation", size)
                assert len(chosen) == size
                ours = validate(
                    self.engine,
                    self.task,
                    HeldOut(self.task, chosen, self.config, self.world.data_rank, self.world.data_size),
                    agreement,
                )
                rows = [place.samples.read(place.index) for place in chosen]
                batch = self.task.collate(rows, size, [Row(0, 0, 0)] * size)
                given = self.engine.call(partial(_forward, batch.tensors["features"]))
                right = batch.tensors["label" if "label" in batch.tensors else "target"]
                assert ours is not None
                found.append((ours, given.numpy(), right.numpy()))
            super().save_now()

    assert start(Config.model_validate(made), StopWish(), Measured) == 0
    return found


def _forward(features: torch.Tensor, model: Any) -> torch.Tensor:
    given: torch.Tensor = model(features)
    return given


@pytest.mark.parametrize("ranks", [later(1), later(2), later(3), 5])
def test_rates_are_those_of_scikit_learn(ranks: int, tmp_path: Path) -> None:
    from sklearn import metrics as known

    for found in run_ranks(ranks, measure, config(tmp_path, {"name": "classify"}), timeout_s=180):
        assert len(found) == len(SIZES)
        for ours, logits, right in found:
            given = logits.argmax(1)
            theirs = {"accuracy": known.accuracy_score(right, given)}
            for average in ("macro", "micro"):
                rates = known.precision_recall_fscore_support(right, given, average=average, zero_division=0)
                theirs |= {f"{name}_{average}": rates[i] for i, name in enumerate(("precision", "recall", "f1"))}
            assert [ours[name] for name in RATES] == pytest.approx([theirs[name] for name in RATES], abs=1e-12)
            logs = torch.from_numpy(logits).double().log_softmax(1)[range(len(right)), right]
            assert ours["loss"] == pytest.approx(-float(logs.mean()), rel=1e-6)  # ours is computed in fp32


@pytest.mark.parametrize("ranks", [later(1), 3])
def test_two_labels_have_a_positive_one(ranks: int, tmp_path: Path) -> None:
    from sklearn import metrics as known

    for found in run_ranks(ranks, measure, config(tmp_path, {"name": "classify"}, labels=2), timeout_s=180):
        for ours, logits, right in found:
            rates = known.precision_recall_fscore_support(right, logits.argmax(1), average="binary", zero_division=0)
            assert [ours[name] for name in ("precision", "recall", "f1")] == pytest.approx(rates[:3], abs=1e-12)


@pytest.mark.parametrize("ranks", [later(1), 2, later(5)])
def test_errors_are_those_of_scikit_learn(ranks: int, tmp_path: Path) -> None:
    from sklearn import metrics as known

    made = config(tmp_path, {"name": "regress"})
    with (tmp_path / "table.csv").open() as file:
        values = {float(row["target"]) for row in csv.DictReader(file)}
    for found in run_ranks(ranks, measure, made, timeout_s=180):
        for ours, given, right in found:
            # In the target's own units, as far as fp32 resolves a normalised target.
            assert ours["mse"] >= 0
            scale2 = ours["mse"] / max(known.mean_squared_error(right, given), 1e-30)
            assert scale2 == pytest.approx(np.var(sorted(values)), rel=0.2)  # of the training rows alone
            theirs = known.mean_absolute_error(right, given) * scale2**0.5
            assert ours["mae"] == pytest.approx(theirs, rel=1e-6)
            if len(right) > 1:
                assert ours["r2"] == pytest.approx(known.r2_score(right, given), rel=1e-5, abs=1e-6)


def rows(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(made["run"]["dir"]) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["fsdp", later("zero")])
@pytest.mark.parametrize("task", ["classify", "regress"])
def test_the_curve_is_the_same_at_every_size(task: str, kind: str, tmp_path: Path) -> None:
    curves = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        made = config(folder, {"name": task}, parallel={"engine": kind})
        made["train"] |= {"steps": 8, "validate_every_steps": 4}
        assert train(made, ranks) == [0] * ranks
        curves.append([row.get("loss", row.get("validation_loss")) for row in rows(made)])
    assert len(curves[0]) == 10
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize(("seed", "ranks"), [(0, 1), *(pytest.param(n, 2, marks=pytest.mark.full) for n in range(3))])
def test_digits_are_learned(seed: int, ranks: int, tmp_path: Path) -> None:
    """At least 97 % of test digits; the majority baseline stands beside it."""
    words = [f"run.dir={tmp_path}/run", f"data.cache={tmp_path}/cache", f"run.seed={seed}", "run.tensorboard=false"]
    made = to_dict(load("digits-mlp", words))
    assert train(made, ranks, timeout_s=240) == [0] * ranks
    (tested,) = [row for row in rows(made) if "test_accuracy" in row]
    assert tested["test_majority"] < 0.15
    assert tested["test_accuracy"] >= 0.97


@pytest.mark.full
def test_the_table_of_diabetes_is_learned(tmp_path: Path) -> None:
    """At least nearly as good as scikit-learn's linear regression. r2 is about 0.4 to 0.5 for all methods."""
    words = [f"run.dir={tmp_path}/run", f"data.cache={tmp_path}/cache", "run.tensorboard=false"]
    made = to_dict(load("regression-mlp", words))
    assert train(made, 2, timeout_s=240) == [0, 0]
    assert max(row["validation_r2"] for row in rows(made) if "validation_r2" in row) > 0.35
