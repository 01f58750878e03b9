"""`--full` (`make life`) runs every phase with every cause under both engines, and prints docs/life.md's tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.register_assert_rewrite("tests.life.runs")

Row = tuple[str, str, str, str, str, str]
HEAD: Row = ("started by", "phase", "cause", "exit code", "seconds until gone", "resumed at step")
ROWS: dict[str, list[Row]] = {"FSDP2": [], "ZeRO 3": []}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for engine, rows in ROWS.items():
        for line in (f"Under {engine}:", HEAD, ("---",) * len(HEAD), *rows) if rows else ():
            terminalreporter.write_line(line if isinstance(line, str) else f"| {' | '.join(line)} |")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all phases and causes run, and every start is its own command."""
    return bool(request.config.getoption("full"))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the Markdown table of the test's engine, which is printed at the end of the session."""
    engine = "ZeRO 3" if request.node.callspec.params["engine"] == "zero" else "FSDP2"

    def note(by: str, phase: str, cause: str, code: int, seconds: str, resumed: int) -> None:
        ROWS[engine].append((by, phase, cause, str(code), seconds, str(resumed)))

    return note
