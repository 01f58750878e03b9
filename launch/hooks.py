"""Tell the user's own command and webhook that something happened. They may do anything. So they get a few seconds, and
nothing that they do delays or fails a run.

A webhook's address is often a secret, so the config only names the variable that holds it. The output of a command may
be a secret too, and is thrown away.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from configs.errors import UserError
from trainer.life.attempts import TOLD_PREFIXES

PATIENCE_S = 4.0  # a requeued job is killed after KillWait: 30 s at most sites, 5 s in a rehearsal
_TO_SAY_S = 0.5  # time to report a time-out
Facts = dict[str, Any]


def refuse_written_down(key: str, variable: str | None) -> None:
    """Raise UserError for a webhook whose address would be written into the run folder."""
    if variable is not None and variable.startswith(TOLD_PREFIXES):
        prefix = next(prefix for prefix in TOLD_PREFIXES if variable.startswith(prefix))
        raise UserError(f"{key}: variables {prefix}* are written into the run folder: give {variable} another name")


class Hooks:
    """`tell` returns at once. A failure is reported as one line through `say`."""

    def __init__(self, command: str | None, webhook: str | None, say: Callable[[str], None]) -> None:
        self._command, self._webhook, self._say = command, webhook, say
        self._running: list[threading.Thread] = []

    def tell(self, facts: Facts) -> None:
        """Run the command with MUSTER_EVENT, MUSTER_TEXT and so on. Post the same facts as JSON to the webhook."""
        calls: list[tuple[str, Callable[[], str | None]]] = []
        if (command := self._command) is not None:
            calls.append(("hook", lambda: _run(command, facts)))
        if (variable := self._webhook) is not None:
            calls.append(("webhook", lambda: _post(variable, facts)))
        self._running = [thread for thread in self._running if thread.is_alive()]
        for name, call in calls:
            thread = threading.Thread(target=self._one, args=(name, call), daemon=True)
            thread.start()
            self._running.append(thread)

    def wait(self) -> None:
        """Wait until all calls have ended or timed out. A look-up of a name ignores time-outs, and is left behind."""
        until = time.monotonic() + PATIENCE_S + _TO_SAY_S
        for thread in self._running:
            thread.join(max(until - time.monotonic(), 0.0))

    def _one(self, name: str, call: Callable[[], str | None]) -> None:
        try:
            failure = call()
        except Exception as error:  # noqa: BLE001 - any error, and its message may hold the secret
            failure = type(error).__name__
        if failure is not None:
            self._say(f"{name}: {failure}")


def _run(command: str, facts: Facts) -> str | None:
    told = {
        f"MUSTER_{key.upper()}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()
    }
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        env={**os.environ, **told},
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    )
    try:
        status = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not done after {PATIENCE_S:g} s, ended"
    return None if status == 0 else f"exit code {status}"


def _post(variable: str, facts: Facts) -> str | None:
    address = os.environ.get(variable, "")
    if not address.startswith(("https://", "http://")):
        return f"the environment variable {variable} holds no address (http://...)" if address else f"no {variable} set"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(facts).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except TimeoutError:
        return f"no answer within {PATIENCE_S:g} s"
    except urllib.error.URLError as error:
        return error.reason.strerror or "no answer" if isinstance(error.reason, OSError) else type(error).__name__
