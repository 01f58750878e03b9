"""Any checkpoint in any layout, whatever was and is frozen: no bit is lost on the way."""

from __future__ import annotations

import pytest

from tests.matrix.cells import BESIDES, DIAGONAL, LAYOUTS, MATRIX, PATTERNS, VARIANTS, Cell
from tests.matrix.harness import Matrix, Outcome

# Cells that are impossible, and words of the reader's reason. There are none.
REFUSED: dict[tuple[str, str], str] = {}

_CELLS = [
    pytest.param(cell, id=str(cell), marks=[] if cell in DIAGONAL else pytest.mark.full)
    for cell in [*DIAGONAL, *(cell for cell in [*MATRIX, *BESIDES] if cell not in DIAGONAL)]
]


@pytest.mark.parametrize("cell", _CELLS)
def test_cell(cell: Cell, matrix: Matrix, outcomes: dict[Cell, Outcome]) -> None:
    outcomes[cell] = Outcome(["it did not end"])
    outcome = outcomes[cell] = matrix.run(cell)
    reason = REFUSED.get((cell.writer, cell.reader))
    if reason is None:
        assert outcome.refused is None
        assert not outcome.wrong, "\n".join(outcome.wrong)
    else:
        assert outcome.refused is not None
        assert reason in outcome.refused


@pytest.mark.full
def test_no_cell_was_left_out(outcomes: dict[Cell, Outcome]) -> None:
    assert len(MATRIX) == len(set(MATRIX)) == len(LAYOUTS) ** 2 * len(PATTERNS) == 384
    assert {*MATRIX, *BESIDES} == outcomes.keys()


def test_make_test_has_each_layout_pattern_and_variant() -> None:
    assert {end for cell in DIAGONAL for end in (cell.writer, cell.reader)} == set(LAYOUTS)
    assert {cell.pattern for cell in DIAGONAL} == set(PATTERNS)
    assert {cell.variant for cell in DIAGONAL} == {"", *VARIANTS}
    assert set(DIAGONAL) < {*MATRIX, *BESIDES}
