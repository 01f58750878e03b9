"""The matrix with ZeRO: checkpoints of stages 1 to 3 read in every layout, and those of every layout read in these
stages.

`make matrix-zero` runs all of it. That takes long, so cells that held are recorded, and run again only when the code
has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.matrix.cells import PATTERNS, ZERO, ZERO_BESIDES, ZERO_DIAGONAL, ZERO_MATRIX, Cell
from tests.matrix.harness import Matrix, Outcome

ROOT = Path(__file__).resolve().parents[2]
CODE = ("configs", "models", "trainer", "tests/matrix")
_ALL = list(dict.fromkeys([*ZERO_DIAGONAL, *ZERO_MATRIX, *ZERO_BESIDES]))


class Held:
    """Cells that held with this very code, in a file, and the loss difference of each."""

    def __init__(self, folder: Path) -> None:
        digest = hashlib.sha256()
        for path in sorted(path for part in CODE for path in (ROOT / part).rglob("*.py")):
            digest.update(path.read_bytes())
        self.path = folder / f"{digest.hexdigest()[:16]}.jsonl"
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        self.cells: dict[str, float] = dict(json.loads(row) for row in rows)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([str(cell), outcome.loss_difference]) + "\n")


@pytest.fixture(scope="module")
def held(request: pytest.FixtureRequest) -> Iterator[Held]:
    return Held(request.config.cache.mkdir("matrix"))


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=str(cell), marks=[] if cell in ZERO_DIAGONAL else pytest.mark.full) for cell in _ALL],
)
def test_cell(
    cell: Cell, matrix: Matrix, outcomes: dict[Cell, Outcome], held: Held, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("full") and str(cell) in held.cells:
        outcomes[cell] = Outcome(loss_difference=held.cells[str(cell)])
        return
    outcomes[cell] = Outcome(["it did not end"])
    outcome = outcomes[cell] = matrix.run(cell)
    assert outcome.refused is None
    assert not outcome.wrong, "\n".join(outcome.wrong)
    held.add(cell, outcome)


def test_make_test_has_each_stage_and_pattern() -> None:
    stages = [name.split()[0] for name in ZERO]
    for end in (lambda c: c.writer, lambda c: c.reader):
        assert {end(cell).split()[0] for cell in ZERO_DIAGONAL} == {*stages, "FSDP"}
    assert {cell.pattern for cell in ZERO_DIAGONAL} == set(PATTERNS)


@pytest.mark.full
def test_no_cell_was_left_out(outcomes: dict[Cell, Outcome]) -> None:
    assert len(ZERO_MATRIX) == len(set(ZERO_MATRIX)) == (17**2 - 8**2) * len(PATTERNS) == 1350
    assert {*ZERO_MATRIX, *ZERO_BESIDES} <= outcomes.keys()
