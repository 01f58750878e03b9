"""The matrix can fail: it finds one wrong bit, a missing key or another next sample, although all checksums are
right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.matrix import damage
from tests.matrix.cells import Cell
from tests.matrix.harness import Matrix

CELL = Cell("FSDP 2", "DDP 2", "frozen after having trained")
TRAINS, FROZEN = "blocks.1.attn.wo.weight", "blocks.0.attn.wo.weight"
STATE = ("exp_avg", "exp_avg_sq")


@pytest.fixture
def outcome_of(matrix: Matrix, tmp_path: Path) -> Callable[..., tuple[str | None, list[str]]]:
    """(refusal, the faults found) when the cell's checkpoint is damaged before it is read."""

    def outcome_of(how: Callable[..., None], *arguments: object) -> tuple[str | None, list[str]]:
        copy = damage.copy_of(matrix.written(CELL).stored.folder, tmp_path)
        how(copy, *arguments)
        outcome = matrix.run(CELL, copy)
        return outcome.refused, outcome.wrong

    return outcome_of


def test_made_to_fit_without_damage_passes(outcome_of: Callable[..., tuple[str | None, list[str]]]) -> None:
    assert outcome_of(damage.shift, 0) == (None, [])


@pytest.mark.parametrize(
    ("key", "where"),
    [
        (f"{TRAINS}.exp_avg", "loaded"),
        (f"{TRAINS}.exp_avg_sq", "loaded"),
        (TRAINS, "loaded"),
        (FROZEN, "loaded"),
        ("drop.gain", "loaded"),
        (f"{FROZEN}.exp_avg", "saved at once"),  # carried from file to file, never in memory
    ],
)
def test_one_bit(key: str, where: str, outcome_of: Callable[..., tuple[str | None, list[str]]]) -> None:
    refused, wrong = outcome_of(damage.flip, key)
    assert refused is None
    assert f"{where}: {key} differs in 1 of" in "\n".join(wrong)


def test_one_state_key_less_is_refused(outcome_of: Callable[..., tuple[str | None, list[str]]]) -> None:
    refused, _ = outcome_of(damage.drop, [f"{TRAINS}.exp_avg"])
    assert refused is not None
    assert f"1 missing: {TRAINS}.exp_avg (optimizer state)" in refused


@pytest.mark.parametrize(("parameter", "where"), [(TRAINS, "loaded"), (FROZEN, "saved at once")])
def test_state_that_is_said_never_to_have_been(
    parameter: str, where: str, outcome_of: Callable[..., tuple[str | None, list[str]]]
) -> None:
    """The reader may believe the manifest that nothing is lost, but the cell must find the loss."""
    refused, wrong = outcome_of(damage.drop, [f"{parameter}.{state}" for state in STATE], parameter)
    assert refused is None
    assert f"{where}: {parameter}.exp_avg is missing" in wrong


def test_one_sample_further(outcome_of: Callable[..., tuple[str | None, list[str]]]) -> None:
    refused, wrong = outcome_of(damage.shift, 1)
    assert refused is None
    assert any(line.startswith("loaded, rank 0: progress: consumed_samples is 22, not 21") for line in wrong)
    assert any(line.startswith("samples of step: 4 is [22, ") for line in wrong)
    assert any(line.startswith("losses") for line in wrong)
