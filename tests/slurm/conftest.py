"""One rehearsal cluster for all tests of this folder. Where it cannot be started, one line tells why they did not run.

With MUSTER_TEST_SLURM=1, as in .ci/run, that is an error instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm.rehearsal import cluster as clusters
from slurm.rehearsal.cluster import Cluster
from slurm.rehearsal.config import Home
from slurm.rehearsal.net import namespaces_allowed
from tests.left_out import LEFT_OUT

_REQUIRED = "MUSTER_TEST_SLURM"
_HEAD = ("what happened", "noticed by", "seconds until it trained again", "steps lost")
_ROWS: list[tuple[str, ...]] = []
Note = Callable[[str, str, float, int], None]


def _cannot_run() -> str | None:
    why = clusters.missing()
    if why is None and not namespaces_allowed():
        # Plain nodes need their names in /etc/hosts, and a test that a person runs must change nothing on the machine.
        why = f"no namespaces here for the nodes of a cluster; {_REQUIRED}=1 runs them as plain daemons"
    return why


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, mounting = using("cluster", items), using("may_mount", items)
    why = None if not wanted or os.environ.get(_REQUIRED) else _cannot_run()
    if why is not None:
        leave_out(wanted, f"Slurm tests could not run: {why}", config, items)
    elif mounting and not namespaces_allowed():
        leave_out(mounting, "Slurm test could not run: nothing may be mounted here", config, items)


def using(fixture: str, items: list[pytest.Item]) -> list[pytest.Item]:
    return [item for item in items if fixture in getattr(item, "fixturenames", ())]


def leave_out(left: list[pytest.Item], why: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
    config.stash[LEFT_OUT].add(f"{len(left)} {why}")


@pytest.fixture
def may_mount() -> None:
    """For tests that mount something in their own namespace. They are skipped where that is not allowed."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """3 nodes with 4 pretended GPUs each, which end with the session."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "tests.slurm.guard"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    try:
        told = guard.stdout.readline().strip()
        started = clusters.find(Home(Path(told)))
        assert started is not None, told
        assert started.settings.accounting or not os.environ.get(_REQUIRED), started.settings.no_accounting
        yield started
    finally:
        guard.stdin.close()
        guard.wait(timeout=60)


@pytest.fixture
def note() -> Note:
    """Adds a row to a Markdown table that is printed at the end of the session."""

    def note(what: str, noticed: str, seconds: float, lost: int) -> None:
        _ROWS.append((what, noticed, f"{seconds:.0f}", str(lost)))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for row in (_HEAD, ("---",) * len(_HEAD), *_ROWS) if _ROWS else ():
        terminalreporter.write_line(f"| {' | '.join(row)} |")
