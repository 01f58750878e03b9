"""`--full` (`make matrix`) runs every cell and prints the table of docs/matrix.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.matrix.cells import (
    BESIDES,
    EVERY,
    LAYOUTS,
    MATRIX,
    PATTERNS,
    VARIANTS,
    ZERO,
    ZERO_BESIDES,
    ZERO_MATRIX,
    Cell,
)
from tests.matrix.harness import Matrix, Outcome

OUTCOMES: dict[Cell, Outcome] = {}


@pytest.fixture(scope="module")  # so that the ranks have ended when other tests run
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    made = Matrix(tmp_path_factory.mktemp("matrix"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def outcomes() -> dict[Cell, Outcome]:
    """The outcome of each cell so far, printed at the end of the session."""
    return OUTCOMES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("full") or not OUTCOMES:
        return
    lines = table() if any(cell in OUTCOMES for cell in MATRIX) else []
    lines += zero_table() if any(cell in OUTCOMES for cell in ZERO_MATRIX) else []
    for line in lines:
        terminalreporter.write_line(line)


def table() -> list[str]:
    """The matrix in Markdown: a row for each checkpoint, a column for each layout that read it."""
    head = ["written by", "pattern", *LAYOUTS, "largest difference of losses"]
    rows = [head, ["---"] * len(head)]
    for writer in LAYOUTS:
        for pattern in PATTERNS:
            cells = [OUTCOMES.get(Cell(writer, reader, pattern)) for reader in LAYOUTS]
            rows.append([writer, pattern, *map(_words, cells), _worst(cells)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"{sum(cell in OUTCOMES for cell in MATRIX)} of {len(MATRIX)} cells were tried.", ""]
    lines += [
        "| besides, each checkpoint once, read under one other layout | cells | ok | largest difference of losses |",
        "| --- | --- | --- | --- |",
    ]
    for variant, meaning in VARIANTS.items():
        cells = [OUTCOMES.get(cell) for cell in BESIDES if cell.variant == variant]
        lines.append(f"| {variant}: {meaning} | {len(cells)} | {[*map(_words, cells)].count('ok')} | {_worst(cells)} |")
    return lines


def zero_table() -> list[str]:
    """For the cells with ZeRO: how many of the patterns held, by writer and reader."""
    rows = [["written by", *EVERY, "largest difference of losses"], ["---"] * (len(EVERY) + 2)]
    for writer in EVERY:
        counts, every = [], []
        for reader in EVERY:
            cells = [OUTCOMES.get(Cell(writer, reader, pattern)) for pattern in PATTERNS]
            every += cells
            here = writer in ZERO or reader in ZERO
            counts.append(f"{[*map(_words, cells)].count('ok')} of {len(cells)}" if here else "")
        rows.append([writer, *counts, _worst(every)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for variant in VARIANTS:
        cells = [OUTCOMES.get(cell) for cell in {*ZERO_BESIDES} if cell.variant == variant]
        lines.append(f"{variant}: {[*map(_words, cells)].count('ok')} of {len(cells)} cells ok, {_worst(cells)}")
    return lines


def _words(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run"
    if outcome.refused:
        return f"refused: {outcome.refused.splitlines()[0]}"
    return "FAILED" if outcome.wrong else "ok"


def _worst(cells: list[Outcome | None]) -> str:
    differences = [cell.loss_difference for cell in cells if cell is not None]
    return f"{max(differences):.1e}" if differences else ""
