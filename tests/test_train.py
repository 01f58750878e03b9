"""Whole runs: they learn, they do not depend on the layout, and they resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from tests.distributed import run_ranks, tiny, train
from tests.engines import ENGINES, rows, under_both
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json, read_rows

# The order in which fp32 terms are added differs between layouts. Over 50 steps of this model the losses then differ by
# about 1e-6 (measured). A lost sample, a wrong divisor or a doubled gradient changes them by over 1e-2, already in step
# 2.
ORDER_OF_SUMMATION = 2e-5
STEPS, MORE_STEPS = 4, 50


def losses(config: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in read_rows(RunFolder(Path(config["run"]["dir"])).metrics) if "loss" in row]


def tensors(run: str, step: int) -> dict[str, bytes]:
    """Every stored piece of a checkpoint, by the safetensors library."""
    found = {}
    for path in sorted(Path(run, "checkpoints", f"step-{step:08d}").glob("*/*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                found[f"{path.parent.name}/{key}"] = file.get_tensor(key).numpy().tobytes()
    return found


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"train__micro_batch": 3}),
    (2, {"parallel__replicate": 2}),
    (2, {"parallel__activation_checkpoint": "full", "train__micro_batch": 16}),
    (3, {"parallel__activation_checkpoint": "selective"}),
    (2, {"parallel__compile": True, "parallel__activation_checkpoint": "selective"}),
]
FURTHER: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"parallel__accumulate": "unsharded", "train__micro_batch": 5}),
    (2, {"parallel__cpu_offload": True, "parallel__reshard": False}),
    (4, {"parallel__replicate": 2, "train__micro_batch": 2}),
    (5, {}),
    (6, {"train__micro_batch": 64}),
]


COMMON = {"train__global_batch": 64, "train__micro_batch": 64, "optim__schedule": "constant"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[float]:
    full = request.config.getoption("full")
    config = tiny(tmp_path_factory.mktemp("reference"), **COMMON, train__steps=MORE_STEPS if full else STEPS)
    assert train(config) == [0]
    found = losses(config)
    assert len(found) == (MORE_STEPS if full else STEPS)
    assert found[STEPS - 1] < found[0] - 0.1
    assert not full or found[-1] < found[0] - 1
    return found


@pytest.mark.parametrize("steps", [STEPS, pytest.param(MORE_STEPS, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("size", "changes"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.full) for layout in FURTHER)],
    ids=lambda v: str(v) if isinstance(v, int) else "-".join(v),
)
def test_loss_does_not_depend_on_the_layout(
    size: int, changes: dict[str, Any], steps: int, reference: list[float], tmp_path: Path
) -> None:
    config = tiny(tmp_path, **{**COMMON, "train__steps": steps, **changes})
    assert train(config, size, timeout_s=280) == [0] * size  # compiling takes a while
    assert losses(config) == pytest.approx(reference[:steps], abs=ORDER_OF_SUMMATION)


@pytest.mark.parametrize(("size", "engine"), rows([("2", "fsdp"), ("2", "zero")], [1, 2], ENGINES), indirect=["engine"])
def test_resuming_equals_going_on_bit_for_bit(size: int, engine: dict[str, Any], tmp_path: Path) -> None:
    changes = {"checkpoint__every_steps": 10, "model__dropout": 0.1, **engine}
    straight = tiny(tmp_path / "straight", train__steps=20, **changes)
    broken = tiny(tmp_path / "broken", train__steps=10, **changes)
    broken["data"] = straight["data"]
    straight["optim"]["schedule"] = broken["optim"]["schedule"] = "constant"  # else train.steps changes the rates
    assert train(straight, size) == [0] * size
    assert train(broken, size) == [0] * size
    broken["train"]["steps"] = 20
    assert train(broken, size) == [0] * size
    assert losses(broken) == losses(straight)
    ours, theirs = tensors(broken["run"]["dir"], 20), tensors(straight["run"]["dir"], 20)
    assert ours == theirs
    assert any(key.startswith("optim/") for key in ours)


def samples_by_step(config: dict[str, Any]) -> dict[int, list[int]]:
    """The numbers of the samples that the ranks got, per step, over all attempts."""
    found: dict[int, list[int]] = {}
    for path in Path(config["run"]["dir"]).glob("attempts/*/samples-*.jsonl"):
        for row in read_rows(path):
            found.setdefault(row["step"], []).extend(row["samples"])
    return {step: sorted(samples) for step, samples in found.items()}


@under_both
def test_another_world_size_goes_on_at_the_very_sample(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, train__steps=4, train__global_batch=10, data__record_samples=True, **engine)
    for size, steps in ((2, 4), (3, 7), (1, 9), (4, 12)):
        config["train"]["steps"] = steps
        assert train(config, size) == [0] * size
    found = samples_by_step(config)
    assert found == {step: list(range(10 * (step - 1), 10 * step)) for step in range(1, 13)}
    manifest = read_json(Path(config["run"]["dir"]) / "checkpoints/step-00000012/manifest.json")
    assert manifest["position"] == {"consumed_samples": 120}


def stop_at(step: int, config: dict[str, Any]) -> int:
    """A run in which somebody touches STOP during `step`."""
    from configs.config import Config
    from trainer.data.batch import StepBatch
    from trainer.life.stop import StopWish
    from trainer.run import Run
    from trainer.start import start

    class Stopped(Run):
        def record_samples(self, batch: StepBatch) -> None:
            if batch.step == step:
                self.folder.stop.touch()
                self.wish.poll()  # not left to the thread that looks: these steps take milliseconds

    return start(Config.model_validate(config), StopWish(), Stopped)


@pytest.mark.full
@pytest.mark.parametrize(("size", "step"), [(1, 8), (2, 10)])
def test_a_stop_leaves_no_trace_in_what_is_learned(
    size: int, step: int, engine: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped at a validation, at a save or between: losses, validations and the last checkpoint have the same bits."""
    changes = {"train__steps": 20, "train__validate_every_steps": 5, "checkpoint__every_steps": 10, **engine}
    straight, broken = tiny(tmp_path / "straight", **changes), tiny(tmp_path / "broken", **changes)
    broken["data"] = straight["data"]
    assert train(straight, size) == [0] * size
    assert run_ranks(size, stop_at, step, broken) == [3] * size
    assert train(broken, size) == [0] * size
    assert losses(broken) == losses(straight)
    assert validations(broken) == validations(straight)
    assert list(validations(broken)) == [5, 10, 15, 20]
    assert tensors(broken["run"]["dir"], 20) == tensors(straight["run"]["dir"], 20)
    last = [read_json(Path(c["run"]["dir"]) / "checkpoints/step-00000020/manifest.json") for c in (broken, straight)]
    assert last[0]["loop"] == last[1]["loop"]


def validations(config: dict[str, Any]) -> dict[int, float]:
    rows = read_rows(RunFolder(Path(config["run"]["dir"])).metrics)
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def test_the_tokenizer_decides_the_vocabulary_that_is_left_out(tmp_path: Path) -> None:
    """It is written down, and the next start finds it there; the run is that of a config that says it."""
    said, left_out = tiny(tmp_path / "said", model__vocab_size=257), tiny(tmp_path / "left_out")
    del left_out["model"]["vocab_size"]
    left_out["data"] = said["data"]
    for config in (said, left_out):
        assert train(config, 2) == [0, 0]
        config["train"]["steps"] = 8
        assert train(config, 1) == [0]
    assert losses(left_out) == losses(said)
    assert yaml.safe_load((Path(left_out["run"]["dir"]) / "config.yaml").read_text())["model"]["vocab_size"] == 257
