"""A task that Muster does not know trains, stops, resumes, freezes, reshards and is shown like any other."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RanksFailed, tiny, train
from stored import Stored

from launch.look.goodput import goodput
from tests.toy import Difference
from trainer.data.batch import Batch
from trainer.life.folder import RunFolder
from trainer.tasks.base import Better

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("validation_loss", "validation_near")
LOOKING = ("watch --once run", "report run", "checkpoint list run", "checkpoint verify run")


def toy(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config of the toy with 61 records, so that no batch and no validation set divides evenly."""
    draw = random.Random(0)
    table = folder / "pairs.csv"
    if not table.exists():
        table.write_text("a,b\n" + "".join(f"{draw.uniform(-9, 9)},{draw.uniform(-9, 9)}\n" for _ in range(61)))
    config = tiny(folder)
    config["model"] = {"name": "tests.toy:build", "options": {"width": 6}}
    config["task"] = {"name": "tests.toy:Difference"}
    config["data"] = {
        "cache": str(folder / "cache"),
        "sources": [{"name": "pairs", "kind": "csv", "path": str(table)}],
        "validation_fraction": 0.2,
    }
    config["optim"]["schedule"] = "constant"
    config["train"] |= {"steps": 6, "global_batch": 7, "micro_batch": 2, "validate_every_steps": 3}
    for key, value in changes.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    return config


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def newest(folder: Path) -> dict[str, torch.Tensor]:
    return Stored(max((folder / "run/checkpoints").glob("step-*"))).tensors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert train(toy(folder)) == [0]
    return folder


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 3), pytest.param("zero", 1, marks=pytest.mark.full), ("zero", 3)])
def test_every_engine_and_size_learns_the_same(kind: str, ranks: int, alone: Path, tmp_path: Path) -> None:
    assert train(toy(tmp_path, parallel__engine=kind), ranks) == [0] * ranks
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    told = [
        [row[key] for row in rows(place) if "validation_loss" in row] for place in (tmp_path, alone) for key in KEYS
    ]
    assert told[: len(KEYS)] == [pytest.approx(values, rel=1e-5) for values in told[len(KEYS) :]]


KEYS = ("validation_loss", "validation_near")


def test_it_resumes_bit_for_bit_and_on_fewer_ranks(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    assert train(toy(straight), 3) == [0] * 3
    assert train(toy(stopped, train__steps=3), 3) == [0] * 3
    assert train(toy(stopped), 3) == [0] * 3
    first, second = newest(straight), newest(stopped)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert losses(stopped) == losses(straight)
    assert train(toy(stopped, train__steps=8), 2) == [0] * 2  # 3 -> 2
    assert train(toy(straight, train__steps=8), 3) == [0] * 3
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-5)


def test_what_is_frozen_stays(alone: Path, tmp_path: Path) -> None:
    path = str(max((alone / "run/checkpoints").glob("step-*")))
    assert train(toy(tmp_path, start__from=path, freeze__frozen=["0.*"]), 2) == [0] * 2
    before, after = newest(alone), newest(tmp_path)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])


def test_it_is_watched_reported_and_listed(alone: Path) -> None:
    found = [row for row in rows(alone) if "loss" in row][-1]
    assert found["samples_per_s"] > 0
    assert "tokens_per_s" not in found
    assert goodput(RunFolder(alone / "run")) is not None
    for words in LOOKING:
        command = [sys.executable, "-m", "launch", *words.split()]
        done = subprocess.run(command, cwd=alone, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "samples/s" in done.stdout or "watch" not in words


def test_nothing_else_knows_the_toy() -> None:
    places = [
        path for room in ("configs", "models", "trainer", "launch", "slurm") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(places) > 100
    assert [path for path in places if re.search(r"\b(Difference|toy)\b", path.read_text())] == []
    assert len((ROOT / "tests/toy.py").read_text().splitlines()) < 80


def test_mistakes_are_told(tmp_path: Path) -> None:
    from configs.config import Config
    from configs.errors import UserError
    from models import build_model
    from trainer.tasks import build_task

    def built(**changes: Any) -> Config:
        return Config.model_validate({**toy(tmp_path), **changes})

    for change, told in (
        ({"task": {"name": "tests.toy:Nothing"}}, "no class or function 'Nothing'"),
        ({"task": {"name": "nowhere_at_all:Task"}}, "there is no nowhere_at_all.py in"),
        ({"task": {"name": "tests.toy:Net"}}, "is no task: it has no "),
        ({"task": {"name": "tests.toy:Difference", "options": {"a": 1}}}, "takes no section"),
    ):
        with pytest.raises(UserError, match=told):
            build_task(built(**change))
    for change, told in (
        ({"model": {"name": "tests.toy:build", "options": {"width": "x"}}}, "model.options.width: Input should be"),
        ({"model": {"name": "tests.toy:build", "options": {"widht": 3}}}, "options.widht: .* did you mean width?"),
        ({"model": {"name": "tests.toy:Net"}}, "needs a pydantic model|gave a Net"),
    ):
        with pytest.raises(UserError, match=told):
            build_model(built(**change).model)


class Narrow(Difference):
    """Forgets one of its columns."""

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        total, sums = super().sums(model, batch)
        return total, sums[:1]


class Nameless(Difference):
    """Promises a metric that it does not give."""

    better: Mapping[str, Better] = {"loss": "min", "far": "min"}


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("Narrow", {}, "must give a 0-d total and 2 columns in torch.float64: loss, near"),
        ("Nameless", {"train__best_metric": "far"}, "`better` names 'far', which `metrics` does not give"),
    ],
)
def test_mistakes_that_show_in_a_step_are_told(name: str, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=f"UserError: task.name tests.test_toy:{name}: (.|\n)*{told}"):
        train(toy(tmp_path, task__name=f"tests.test_toy:{name}", **changes), 2)
    assert not (tmp_path / "run/attempts").exists()  # nothing of this start is left


def test_other_code_makes_other_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples in the cache were made by the code of that day: after an edit they would be used silently."""
    from configs.config import Config
    from trainer.tasks import build_task

    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "other_code.py"
    mine.write_text((ROOT / "tests/toy.py").read_text())
    config = Config.model_validate(toy(tmp_path, task__name="other_code:Difference"))
    made = lambda: build_task(config).prepare(config, tmp_path / "cache", print, lambda: False, {})  # noqa: E731
    before = made()
    assert made() == before
    mine.write_text(mine.read_text().replace("a - b", "a + b"))
    assert made() != before


def test_a_job_gets_a_copy_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one run and for an array: an edit after the submission makes another copy."""
    from configs.config import Config
    from slurm.submit import snapshot
    from slurm.submit.array import ArraySubmission
    from slurm.submit.submit import Submission

    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "tests/toy.py").read_text())
    made = toy(tmp_path, model__name="mine:build")
    made["task"]["name"] = "mine:Difference"
    config = Config.model_validate(made)
    kinds = (lambda: Submission(config, config.slurm), lambda: ArraySubmission(config, config.slurm, [config]))
    before = [make() for make in kinds]
    for job in before:
        snapshot.take(job.snapshot, job.configs, True, job.own)
        assert (job.snapshot / "mine.py").read_text() == mine.read_text()
        assert (job.snapshot / "trainer/loop.py").is_file()
    mine.write_text(mine.read_text() + "\n# edited\n")
    assert all(make().snapshot != job.snapshot for make, job in zip(kinds, before, strict=True))
