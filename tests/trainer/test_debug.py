"""The checks of --debug find their faults."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.fingerprint import to_dict
from configs.load import load, presets
from configs.schema.model import DecoderSection
from configs.schema.task import LmSection
from models import IGNORE
from tests.distributed import run_ranks, tiny, train, train_here
from tests.engines import under_both
from trainer.data.batch import Batch
from trainer.debug import STEPS, CheckedEngine, check_first_loss, check_gradients, cut_to_size
from trainer.step import RunFailed
from trainer.tasks.lm import LanguageModelling


def batch(targets: list[int], documents: list[int], rows: int = 1) -> Batch:
    tokens = torch.arange(1, len(targets) + 1)[None]
    return Batch({"tokens": tokens, "targets": torch.tensor([targets]), "documents": torch.tensor([documents])}, rows)


class Asked:
    """An engine that counts the batches that reach it."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def forward_backward(self, batch: Batch, scale: Any, last: bool) -> torch.Tensor:
        self.batches.append(batch)
        return torch.zeros(1, dtype=torch.float64)


def check_batch(batch: Batch) -> None:
    """Check a batch as `--debug` does. Raises RunFailed before the engine gets the batch."""
    inner: Any = Asked()
    checked = CheckedEngine(inner, LanguageModelling(LmSection()), None)
    try:
        checked.forward_backward(batch, lambda: torch.tensor(1.0), last=True)
    finally:
        failed = sys.exc_info()[0] is not None
        assert inner.batches == ([] if failed else [batch])


def test_a_target_of_another_document_is_found() -> None:
    check_batch(batch([2, IGNORE, 4, 5], [0, 0, 1, 1]))
    with pytest.raises(RunFailed, match=r"^check failed: the target of token 1 of sample 0 is another"):
        check_batch(batch([2, 3, 4, 5], [0, 0, 1, 1]))


def test_a_batch_without_targets_is_found() -> None:
    with pytest.raises(RunFailed, match=r"^check failed: a micro batch with samples has no target"):
        check_batch(batch([IGNORE] * 4, [0, 0, 1, 1]))
    check_batch(batch([IGNORE] * 4, [0, 0, 1, 1], rows=0))  # fill-ups alone have no target


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a": 1.0, "b": 1.0}, "b is frozen"),
        ({}, "a is trainable but has no gradient"),
        ({"a": float("nan")}, "a has a gradient that is not finite"),
        ({"a": 0.0}, "a has a gradient of zeros"),
    ],
)
def test_a_wrong_gradient_is_found(gradients: dict[str, float], message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        check_gradients({name: torch.full((2,), value) for name, value in gradients.items()}, {"a"})
    check_gradients({"a": torch.tensor([0.0, 1.0])}, {"a"})


def test_a_first_loss_far_from_guessing_is_found() -> None:
    check_first_loss(5.5, 5.56)
    for loss in (4.0, 7.0, float("nan")):
        with pytest.raises(RunFailed, match=r"first loss is .*, that of guessing is 5\.560"):
            check_first_loss(loss, 5.56)


@pytest.mark.parametrize("name", presets())
def test_every_preset_can_be_cut_to_size(name: str) -> None:
    whole = load(name, []).model
    small = cut_to_size(load(name, []), "somewhere").model
    if not isinstance(whole, DecoderSection):
        assert small == whole
        return
    assert small.dim <= 128
    assert (small.layers, small.vocab_size) == (whole.layers, whole.vocab_size)


def test_epochs_are_cut_to_a_few_steps() -> None:
    longer = load("digits-mlp", ["train.steps=0"]).train.model_copy(update={"epochs": 30.0})
    small = cut_to_size(load("digits-mlp", []).model_copy(update={"train": longer}), "somewhere").train
    assert (small.steps, small.epochs) == (STEPS, None)


def test_a_classifier_runs_under_all_checks(tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path}/run", f"data.cache={tmp_path}/cache"]
    assert train(to_dict(load("digits-mlp", words)), debug=True) == [0]


@under_both
def test_a_run_that_fails_a_check_exits_1_and_says_which(engine: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    config = tiny(tmp_path, model__init_std=3.0, **engine)  # the logits are far from those of a new model
    assert run_ranks(1, train_here, config, True, env={"TMPDIR": str(tmp_path / "kept")}) == [1]
    (folder,) = (tmp_path / "kept").glob("muster-debug-*")
    end = json.loads((folder / "run/attempts/000/end.json").read_text())
    assert (end["reason"], end["cause"], end["requeue"]) == ("failed", "check", False)
    assert "first loss" in (folder / "run/attempts/000/rank-00000.log").read_text()
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_names_an_upper_layer_holds(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, model__layers=5, freeze__frozen=["blocks.4.*"], **engine)
    assert train(config, debug=True) == [0]


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_so_it_does_at_the_other_stages_of_zero(stage: int, tmp_path: Path) -> None:
    zero = {"parallel__engine": "zero", "parallel__zero_stage": stage}
    config = tiny(tmp_path, model__layers=5, freeze__frozen=["blocks.4.*"], **zero)
    assert train(config, debug=True) == [0]


def _debug_on_two(config: dict) -> str:
    from configs.config import Config
    from configs.errors import UserError
    from trainer.debug import debug
    from trainer.life.stop import StopWish

    try:
        debug(Config.model_validate(config), StopWish())
    except UserError as error:
        return str(error)
    return ""


def test_debug_is_for_one_process(tmp_path: Path) -> None:
    assert all("one process" in text for text in run_ranks(2, _debug_on_two, tiny(tmp_path)))
