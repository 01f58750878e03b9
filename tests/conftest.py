"""Two tiers: tests marked `full` run only with `--full` (`make test-all`, and targets for parts of it).

Tests marked `alone` measure time: while one runs, no other worker of pytest-xdist runs a test. `--record` writes down
how long each file took, and long files start first.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.durations import UNKNOWN_S, record, recorded
from tests.left_out import LEFT_OUT
from tests.machine import patience

CLOCK = pytest.StashKey["Clock"]()

# Other processes of the machine decide how long an example takes, so a slow one is no failure.
settings.register_profile("muster", deadline=None)
settings.load_profile("muster")


@pytest.fixture(params=["fsdp", "zero"])
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Changes of a config, so that the same test runs under each engine."""
    return {} if request.param == "fsdp" else {"parallel__engine": "zero", "parallel__zero_stage": 3}


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A temporary folder that everybody may enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also what takes long: every phase, cause and cell")
    parser.addoption("--slice", metavar="K/N", help="each N-th test alone, from the K-th on (make test-all)")
    parser.addoption("--record", action="store_true", help="write down how long each file took")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = set()
    config.stash[CLOCK] = Clock()
    config.pluginmanager.register(config.stash[CLOCK])
    config.option.loadscopereorder = False  # pytest-xdist's own order is by the number of tests, not by their time
    config.addinivalue_line("markers", "full: only with --full (make test-all)")
    config.addinivalue_line("markers", "alone: times something, so no other test runs beside it")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of some hundred processes compiles all of ours again
    sys.dont_write_bytecode = False  # this process has read it already, and hands it on to the server of the ranks
    # Under nohup, or in the background of a script, some are ignored, and so would all be that tests start.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
    if piece := config.getoption("slice"):
        number, count = map(int, piece.split("/"))
        config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % count != number - 1])
        items[:] = items[number - 1 :: count]
    longest_first(config, items)
    be_patient(config, items)


def be_patient(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A limit on a whole test ends a hang, and nothing else: it stretches as others do."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0] if marker else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)


def longest_first(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the scopes of workers by their recorded time, longest first."""
    known = recorded(tier_of(config))
    seconds: Counter[str] = Counter()
    for name in {item.nodeid.split("::")[0] for item in items}:
        seconds[scope_of(name)] += known.get(name, UNKNOWN_S)
    items.sort(key=lambda item: -seconds[scope_of(item.nodeid)])


def tier_of(config: pytest.Config) -> str:
    return "full" if config.getoption("full") else "quick"


def scope_of(nodeid: str) -> str:
    """All tests of a file run on one worker, and so do all of tests/slurm, which share one cluster."""
    return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Scheduling(config, log)


class Clock:
    """Sums the time of each file over all workers."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.split("::")[0]] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = sorted(config.stash[LEFT_OUT])
    elif config.getoption("record"):
        record(tier_of(config), config.stash[CLOCK].seconds)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in sorted(terminalreporter.config.stash[LEFT_OUT]):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Restore the signal handlers. Some commands ignore signals, and would leave that to the next tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let an `alone` test run without others. Every test enters through one gate, and an `alone` test keeps the gate
    shut until the running tests have ended. Otherwise new tests would always be running."""
    alone = item.get_closest_marker("alone") is not None
    locks = item.config.cache.mkdir("locks")
    with held(locks / "gate", fcntl.LOCK_EX) as gate, held(locks / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


@contextmanager
def held(path: Path, how: int) -> Iterator[int]:
    """Hold a lock shared by all processes that test this checkout."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, how)
        yield lock
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process may still have the file open
        os.close(lock)
