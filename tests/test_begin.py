"""Where a run begins: continued, from another run's weights or everything, with frozen parts, after bad checkpoints."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks, tiny, train, train_here
from tests.engines import under_both
from tests.test_mistakes import flip_a_bit
from tests.test_train import losses, tensors
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json, read_rows


def manifest(run: Path, step: int) -> dict:
    return read_json(run / f"checkpoints/step-{step:08d}/manifest.json")


def values(run: Path, step: int, groups: tuple[str, ...] = ("model", "frozen")) -> dict[str, bytes]:
    """Whole tensors by name, however they were cut."""
    checkpoint = Checkpoint(run / f"checkpoints/step-{step:08d}")
    tensors = checkpoint.manifest.tensors
    return {k: checkpoint.read(k).numpy().tobytes() for k, t in tensors.items() if t.group in groups}


@under_both
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_frozen_parameters_stay_and_have_no_state(size: int, engine: dict[str, Any], tmp_path: Path) -> None:
    config, first = tiny(tmp_path / "first", **engine), tmp_path / "first/run"
    assert train(config, 2) == [0, 0]
    frozen = ["embed.*", "blocks.*"]
    changes = {"freeze__frozen": frozen, "freeze__trainable": ["blocks.1.*"], **engine}
    config = tiny(tmp_path, start__from=str(first), **changes)
    assert train(config, size) == [0] * size
    began, ended = values(first, 6), values(tmp_path / "run", 6)
    changed = {name for name in began if began[name] != ended[name]}
    assert changed == {n for n in began if n.startswith(("blocks.1.", "norm.", "head."))}
    stored = manifest(tmp_path / "run", 6)
    groups = {key: tensor["group"] for key, tensor in stored["tensors"].items()}
    assert groups["embed.weight"] == groups["blocks.0.attn.wq.weight"] == "frozen"
    assert set(stored["step_counts"]) == changed
    assert {k.rpartition(".")[0] for k, g in groups.items() if g == "optim"} == changed
    assert stored["position"] == {"consumed_samples": 48}  # weights alone: it began at sample 0
    config["train"]["steps"] = 8
    assert train(config, 3 - size) == [0] * (3 - size)  # frozen parts come back at another world size
    assert values(tmp_path / "run", 8, ("frozen",)) == values(tmp_path / "run", 6, ("frozen",))


@under_both
def test_everything_goes_on_where_the_other_run_stood(engine: dict[str, Any], tmp_path: Path) -> None:
    first = tiny(tmp_path / "first", optim__schedule="constant", **engine)
    assert train(first) == [0]
    second = tiny(tmp_path / "second", optim__schedule="constant", start__take="everything", train__steps=9, **engine)
    second["data"], second["start"]["from"] = first["data"], str(tmp_path / "first/run")
    assert train(second) == [0]
    first["train"]["steps"] = 9
    assert train(first) == [0]
    assert losses(second) == losses(first)[-3:]
    assert tensors(second["run"]["dir"], 9) == tensors(first["run"]["dir"], 9)
    # The same command again continues: start.from is read only while there is no checkpoint.
    second["train"]["steps"] = 10
    assert train(second) == [0]
    assert [row["step"] for row in read_rows(tmp_path / "second/run/metrics.jsonl")] == [7, 8, 9, 10]


@under_both
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_falls_back_from_a_bad_checkpoint_on_all_ranks(size: int, engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, checkpoint__every_steps=2, train__steps=4, optim__schedule="constant", **engine)
    assert train(config, 2) == [0, 0]
    flip_a_bit(tmp_path / "run/checkpoints/step-00000004")
    config["train"]["steps"] = 5
    assert train(config, size) == [0] * size
    names = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert "step-00000004.bad-0" in names
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if row["attempt"] == 1] == [3, 4, 5]
    rejected = [e for e in read_events(RunFolder(tmp_path / "run")) if e["event"] == "checkpoint_rejected"]
    assert len(rejected) == size
    assert rejected[0]["checkpoint"] == "step-00000004"
    assert "safetensors" in rejected[0]["reason"]


@under_both
def test_early_stopping_and_the_best_checkpoint(engine: dict[str, Any], tmp_path: Path) -> None:
    """The learning rate changes nothing, so the first validation stays the best, and its checkpoint is kept."""
    config = tiny(
        tmp_path,
        train__steps=30,
        train__validate_every_steps=2,
        train__early_stop_patience=3,
        optim__lr=1e-30,
        checkpoint__every_steps=2,
        checkpoint__keep={"last": 1, "best": True},
        **engine,
    )
    assert train(config, 2) == [0, 0]
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    validations = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(validations) == [2, 4, 6, 8]  # three after the first were no better
    assert RunFolder(tmp_path / "run").committed_steps() == [2, 8]
    assert manifest(tmp_path / "run", 8)["loop"]["validations_without_better"] == 3
    assert train(config, 2) == [0, 0]  # it stays stopped
    assert read_json(tmp_path / "run/attempts/001/end.json")["step"] == 8


def with_a_first_save_that_fails(config: dict[str, Any]) -> int:
    from trainer.checkpoint.format import disk

    left = [errno.ENOSPC]

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name == "create" and left:
            raise OSError(left.pop(), "No space left on device", operation.path)
        yield

    disk.observer = observe
    return train_here(config, False)


@under_both
def test_a_best_step_that_was_saved_at_the_second_try_is_the_best(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        train__steps=2,
        train__validate_every_steps=2,
        optim__lr=1e-30,
        checkpoint__every_steps=2,
        checkpoint__keep={"last": 1, "best": True},
        **engine,
    )
    assert run_ranks(1, with_a_first_save_that_fails, config) == [0]
    assert [e["checkpoint"] for e in read_events(RunFolder(tmp_path / "run")) if e["event"] == "save_failed"]
    (loss,) = (row["validation_loss"] for row in read_rows(tmp_path / "run/metrics.jsonl") if "validation_loss" in row)
    assert manifest(tmp_path / "run", 2)["metric"] == loss
    config["train"]["steps"] = 8
    assert train(config) == [0]
    assert RunFolder(tmp_path / "run").committed_steps() == [2, 8]


@under_both
def test_changed_steps_are_an_event_that_names_the_schedule(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, **engine)
    assert train(config) == [0]
    config["train"]["steps"] = 8
    assert train(config) == [0]
    changed = [e for e in read_events(RunFolder(tmp_path / "run")) if e["event"] == "steps_changed"]
    assert [(e["old"], e["new"], e["schedule"]) for e in changed] == [(6, 8, "cosine now ends at 8")]
