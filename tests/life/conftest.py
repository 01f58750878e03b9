"""`--full` (`make life`) runs every phase with every cause and prints the table of docs/life.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.register_assert_rewrite("tests.life.runs")

Row = tuple[str, str, str, str, str, str]
HEAD: Row = ("started by", "phase", "cause", "exit code", "seconds until gone", "resumed at step")
ROWS: list[Row] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for row in (HEAD, ("---",) * len(HEAD), *ROWS) if ROWS else ():
        terminalreporter.write_line(f"| {' | '.join(row)} |")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all phases and causes are run, and every start is a command of its own."""
    return bool(request.config.getoption("full"))


@pytest.fixture
def note() -> Callable[..., None]:
    """Adds a row to the Markdown table that ends the session."""

    def note(by: str, phase: str, cause: str, code: int, seconds: str, resumed: int) -> None:
        ROWS.append((by, phase, cause, str(code), seconds, str(resumed)))

    return note
