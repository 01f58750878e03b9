"""The user's command and webhook: called, never waited for, and their secrets kept."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from configs.errors import UserError
from launch.hooks import Hooks, refuse_written_down
from tests.machine import patience

FACTS = {"event": "idle", "text": "run: idle: 9 % active", "activity_pct": 9.0}


def test_a_command_is_told_in_its_environment(tmp_path: Path) -> None:
    said: list[str] = []
    hooks = Hooks(f'echo "$MUSTER_EVENT|$MUSTER_TEXT|$MUSTER_ACTIVITY_PCT" > {tmp_path}/out', None, said.append)
    hooks.tell(FACTS)
    hooks.wait()
    assert (tmp_path / "out").read_text() == "idle|run: idle: 9 % active|9.0\n"
    assert said == []


@pytest.mark.parametrize(
    ("command", "line"), [("exit 3", "hook: exit code 3"), ("sleep 60", "hook: not done after 0.3 s, ended")]
)
def test_what_a_command_does_wrong_is_a_line(command: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.hooks.PATIENCE_S", 0.3)
    said: list[str] = []
    hooks = Hooks(command, None, said.append)
    hooks.tell(FACTS)
    hooks.wait()
    assert said == [line]


def test_telling_does_not_wait_for_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Did it wait, the command would be ended: it ends by itself only after `tell` has returned."""
    monkeypatch.setattr("launch.hooks.PATIENCE_S", 30.0)
    said: list[str] = []
    hooks = Hooks(f"until [ -e {tmp_path}/told ]; do sleep 0.01; done; exit 3", None, said.append)
    hooks.tell(FACTS)
    (tmp_path / "told").touch()
    hooks.wait()
    assert said == ["hook: exit code 3"]


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """A server that accepts POST requests; it answers 500 to /bad."""
    posted: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(500 if self.path == "/bad" else 204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    one = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{one.server_port}", posted
    one.shutdown()
    one.server_close()


def test_a_webhook_gets_json(server: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    address, posted = server
    monkeypatch.setenv("MY_HOOK", address + "/secret")
    said: list[str] = []
    hooks = Hooks(None, "MY_HOOK", said.append)
    hooks.tell(FACTS)
    hooks.wait()
    assert json.loads(posted[0]) == FACTS
    monkeypatch.setenv("MY_HOOK", address + "/bad")
    hooks.tell(FACTS)
    hooks.wait()
    monkeypatch.setenv("MY_HOOK", "http://127.0.0.1:9/secret")
    hooks.tell(FACTS)
    hooks.wait()
    monkeypatch.setenv("MY_HOOK", "secret")
    hooks.tell(FACTS)
    hooks.wait()
    monkeypatch.delenv("MY_HOOK")
    hooks.tell(FACTS)
    hooks.wait()
    refused, no_address = "webhook: Connection refused", "webhook: the environment variable MY_HOOK holds no address"
    assert said == ["webhook: HTTP 500", refused, f"{no_address} (http://...)", "webhook: no MY_HOOK set"]


@pytest.mark.parametrize(
    "address", ["secret", "http://secret:port/x", "http://127.0.0.1:9/secret", "http://secret.invalid/"]
)
def test_no_address_is_ever_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HOOK", address)
    said: list[str] = []
    hooks = Hooks(None, "MY_HOOK", said.append)
    hooks.tell(FACTS)
    hooks.wait()
    (line,) = said
    assert line.startswith("webhook: ")
    assert "secret" not in line


def test_what_a_command_prints_is_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    hooks = Hooks("echo secret; echo secret >&2; no-such-command", None, said.append)
    hooks.tell(FACTS)
    hooks.wait()
    assert (said, capfd.readouterr()) == (["hook: exit code 127"], ("", ""))


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.hooks.PATIENCE_S", 0.5)
    deaf = socket.create_server(("127.0.0.1", 0))  # accepts a request and never answers
    monkeypatch.setenv("MY_HOOK", f"http://127.0.0.1:{deaf.getsockname()[1]}/")
    said: list[str] = []
    hooks = Hooks(f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/child; wait", "MY_HOOK", said.append)
    began = time.monotonic()
    hooks.tell(FACTS)
    hooks.wait()
    assert time.monotonic() - began < patience(2.0)
    assert sorted(said) == ["hook: not done after 0.5 s, ended", "webhook: no answer within 0.5 s"]
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + patience(5.0)
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "it lives on"
            time.sleep(0.01)
    deaf.close()


def test_a_variable_that_is_written_down_is_refused() -> None:
    refuse_written_down("slurm.webhook", "CHAT")
    refuse_written_down("slurm.webhook", None)
    for name in ("MUSTER_CHAT", "SLURM_JOB_CHAT", "NCCL_CHAT"):
        with pytest.raises(UserError, match=r"slurm.webhook: variables .* are written into the run folder"):
            refuse_written_down("slurm.webhook", name)
