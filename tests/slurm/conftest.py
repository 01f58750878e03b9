"""One rehearsal cluster for all tests of this folder. Where none can be started, one line says why they did not run.

With MUSTER_TEST_SLURM=1, as in .ci/run, that is an error instead.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slurm import cluster as clusters
from slurm.cluster import Cluster
from slurm.cluster_config import Home
from slurm.cluster_net import namespaces_allowed

_REQUIRED = "MUSTER_TEST_SLURM"
_PREFIX = "muster-test-cluster-"
_LEFT_OUT: list[str] = []


def _cannot_run() -> str | None:
    why = clusters.missing()
    if why is None and not namespaces_allowed():
        # Plain nodes need their names in /etc/hosts, and a test run by itself changes nothing on a machine.
        why = f"no namespaces here for the nodes of a cluster; {_REQUIRED}=1 runs them as plain daemons"
    return why


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if "cluster" in getattr(item, "fixturenames", ())]
    if not wanted:
        return
    if os.environ.get(_REQUIRED):
        why = clusters.missing()
        if why is not None:
            raise pytest.UsageError(f"{_REQUIRED}: {why}")
        return
    why = _cannot_run()
    if why is not None:
        items[:] = [item for item in items if item not in wanted]
        config.hook.pytest_deselected(items=wanted)
        _LEFT_OUT.append(f"{len(wanted)} Slurm tests could not run: {why}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _LEFT_OUT:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """2 nodes with 4 pretended GPUs each. Ended with the session; a session that was killed, by the next one."""
    place = Path(tempfile.gettempdir())
    for old in place.glob(f"{_PREFIX}*"):
        pid = old.name.removeprefix(_PREFIX)
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and (left := clusters.find(Home(old))) is not None:
            left.down()
    started = None
    home = Home(place / f"{_PREFIX}{os.getpid()}")
    try:
        started = clusters.start(home, nodes=2, gpus=4)
        yield started
    finally:
        started = started or clusters.find(home)
        if started is not None:
            started.down()
