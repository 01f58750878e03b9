"""Signals and requests in one process. tests/life stops whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.life.stop import Cause, Kind, StopWish, write_request

PROGRAM = """
import os, pathlib, signal, sys, time
from trainer.life import stop
stop._AGENT_PATIENCE_S = 0.2
request = os.environ.get("REQUEST")
wish = stop.StopWish(pathlib.Path(request) if request else None)
wish.listen()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
cause = wish.poll()
print(cause.word if cause else None, flush=True)
time.sleep(1.0 if request else 0)
"""


def signalled(*names: str, request: Path | None = None, ignored: bool = False) -> tuple[int, str]:
    """Exit code and cause of a process that sends itself these signals."""
    env = {**os.environ, **({"REQUEST": str(request)} if request else {})}
    command = [sys.executable, "-c", PROGRAM, *names]
    if ignored:
        command = ["sh", "-c", 'trap "" HUP USR2; exec "$@"', "sh", *command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "word"),
    [("SIGINT", "interrupt"), ("SIGTERM", "terminate"), ("SIGUSR2", "warning"), ("SIGHUP", "hangup")],
)
def test_each_signal_is_a_wish(name: str, word: str) -> None:
    assert signalled(name) == (0, word)


def test_the_first_signal_decides() -> None:
    assert signalled("SIGINT", "SIGTERM", "SIGINT") == (0, "interrupt")


def test_under_nohup_a_hangup_is_nothing_but_a_warning_is_heard() -> None:
    """A job script traps USR2 before torchrun, but the ranks still handle it."""
    assert signalled("SIGHUP", ignored=True) == (0, "None")
    assert signalled("SIGHUP", "SIGUSR2", ignored=True) == (0, "warning")


def test_a_launched_worker_hears_its_launcher_alone(tmp_path: Path) -> None:
    """torchrun's SIGTERM means that another rank failed. It is no stop; the process ends a moment later."""
    request = tmp_path / "request"
    assert signalled("SIGINT", "SIGUSR2", "SIGHUP", request=request) == (0, "None")
    assert signalled("SIGTERM", request=request) == (1, "None")
    write_request(request, Cause.WARNING)
    assert signalled("SIGTERM", request=request) == (0, "warning")


def test_stop_file_and_time_limit(tmp_path: Path) -> None:
    wish = StopWish()
    wish.watch(tmp_path / "STOP", limit_s=100.0, began=time.monotonic() - 200.0)
    (tmp_path / "STOP").touch()
    assert wish.poll() is Cause.STOP_FILE  # a person's request wins over the time limit, which has long passed
    limited = StopWish()
    limited.watch(tmp_path / "none", limit_s=100.0, began=time.monotonic() - 200.0)
    assert limited.poll() is Cause.TIME_LIMIT


def test_what_another_rank_asks_for_keeps_its_kind() -> None:
    for kind in Kind:
        assert Cause.elsewhere(kind).kind is kind
