"""The phases of a run's life: a config in which each one lasts, and how to recognise it from outside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed import tiny, write_config
from tests.life.runs import Running, finish_here, write_words
from tests.trainer.data.small_data import bpe

ENDLESS = 100_000


@dataclass(frozen=True)
class Phase:
    """`limit_s`: a time limit that falls into the phase. `steps`: the last step of a run that nobody stops. `before`:
    how many steps an earlier start has made. `prepare` makes data and returns changes of the config. `shorten` removes
    what made the phase long, for later starts."""

    name: str
    reached: Callable[[Running], Any]
    limit_s: float
    steps: int = 12
    before: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path], dict[str, Any]] = lambda folder: {}
    shorten: Callable[[Path], None] = lambda folder: None

    def write(self, folder: Path, endless: bool = False, **changes: Any) -> None:
        """Write the config and its data. `endless`: a run that trains ends only by a stop."""
        folder.mkdir(parents=True, exist_ok=True)
        steps = ENDLESS if endless and self.name != "last step" else self.steps
        common: dict[str, Any] = {
            "train__steps": steps,
            "train__global_batch": 16,
            "optim__schedule": "constant",
            "checkpoint__every_steps": 3,
            "data__record_samples": True,
        }
        write_config(folder, **{**common, **self.changes, **self.prepare(folder), **changes})
        if self.before:
            finish_here(folder, self.before)


def _slow_data(folder: Path) -> dict[str, Any]:
    """Four seconds of tokenising on an idle core. `_fast_data` removes most of it."""
    tiny(folder)  # writes the small corpus
    big = write_words(folder / "corpus" / "big", files=1, words=5000) / "0000.txt"
    for number in range(1, 500):
        (big.parent / f"{number:04d}.txt").hardlink_to(big)
    return {"data__tokenizer": str(bpe(folder / "tokenizer.json")), "model__vocab_size": 300}


def _fast_data(folder: Path) -> None:
    shutil.rmtree(folder / "corpus" / "big")


def _held_out(folder: Path) -> dict[str, Any]:
    write_words(folder / "words", files=40, words=3000)
    return {"data__sources": [{"name": "words", "path": str(folder / "words")}], "data__validation_fraction": 0.5}


def _compiling(run: Running) -> bool:
    return bool(run.attempts()) and (run.attempts()[-1] / "start.json").exists() and run.step() == 0


def _validating(run: Running) -> bool:
    rows = [row for row in run.rows() if row["step"] == 2]
    return len(rows) == 1


SLOW_STEPS = {"train__global_batch": 64}  # 8 micro batches on each of two ranks
PHASES = [
    Phase("start-up", lambda run: run.workers(), limit_s=0.001, before=3),
    Phase("preparation", lambda run: any(run.cache.glob(".tmp-*")), 0.5, prepare=_slow_data, shorten=_fast_data),
    Phase("compile", _compiling, limit_s=2.0, changes={"parallel__compile": True, "model__layers": 1}),
    Phase("step", lambda run: run.step() >= 4, limit_s=2.5, changes=SLOW_STEPS),
    Phase(
        "validation",
        _validating,
        limit_s=1.5,
        steps=2,
        changes={"train__validate_every_steps": 2, "train__validate_samples": 3000, **SLOW_STEPS},
        prepare=_held_out,
    ),
    Phase(
        "saving",
        lambda run: run.step() >= 4 and any(run.folder.checkpoints.glob("*.partial-*")),
        limit_s=3.0,
        changes={
            "model__vocab_size": 16_000,
            "model__dim": 256,
            "train__global_batch": 2,
            "checkpoint__every_steps": 2,
        },
    ),
    Phase("last step", lambda run: run.step() == 2, limit_s=3.0, steps=3, changes={"train__global_batch": 192}),
]
BY_NAME = {phase.name: phase for phase in PHASES}
