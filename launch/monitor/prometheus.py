"""An endpoint for Prometheus: the monitor's newest row as text, at http://HOST:PORT/metrics.

Names follow the rows: a GPU's `power_w` is `muster_gpu_power_w`, a rank's `step` is `muster_rank_step`. A row becomes
text once, when a client first asks for it. One client is served at a time, so many clients cost no more than a bound.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from typing import Any

from trainer.life.folder import RunFolder
from trainer.life.rows import last_row

Row = dict[str, Any]
_CLIENT_S = 2.0  # time for a client to send its request
_NAMES = {"uuid", "index", "rank"}
_OF_RUN = (
    *("step", "loss", "grad_norm", "lr", "tokens_per_s", "samples_per_s", "mfu", "data_wait_s", "step_s", "time_s"),
)
_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Endpoint:
    """`show` each row; clients get the last one. Raises OSError when the address cannot be bound."""

    def __init__(self, host: str, port: int, folder: RunFolder, node: str) -> None:
        self._folder, self._node = folder, node
        self._row: Row | None = None
        self._told: tuple[Row | None, bytes] = (None, b"")
        self._server = _Server((host, port), self._text)
        threading.Thread(target=self._serve, daemon=True).start()

    def show(self, row: Row) -> None:
        self._row = row

    def _serve(self) -> None:
        while True:
            self._server.handle_request()

    def _text(self) -> bytes:
        row = self._row
        if row is not None and self._told[0] is not row:
            # Rank 0's own node reports the training values: its file is seen there at once.
            is_first = any(rank["rank"] == 0 for rank in row["ranks"])
            trained = last_row(self._folder.metrics, "loss", row["attempt"]) if is_first else {}
            self._told = row, exposition(self._folder.root.name, self._node, row, trained).encode()
        return self._told[1]


class _Server(TCPServer):
    allow_reuse_address = True  # a restarted monitor finds its port free at once
    text: Any

    def __init__(self, address: tuple[str, int], text: Any) -> None:
        self.text = text
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that went away in the middle. Any other error is ours, and is raised."""
        if not isinstance(sys.exception(), OSError):
            raise


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_S
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "there is only /metrics")
            return
        text = self.server.text()
        self.send_response(200)
        self.send_header("Content-Type", _TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def version_string(self) -> str:
        return "muster"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing on the run's terminal."""


def exposition(run: str, node: str, row: Row, trained: Row) -> str:
    """Prometheus' text format of one of the monitor's rows and of the last row of metrics.jsonl."""
    samples: dict[str, list[str]] = {}
    for name, value, labels in _samples(row, trained):
        told = ",".join(f'{k}="{_escaped(str(v))}"' for k, v in {"run": run, "node": node, **labels}.items())
        samples.setdefault(f"muster_{name}", []).append(f"muster_{name}{{{told}}} {float(value)!r}\n")
    # All samples of one metric must stand together.
    return "".join(f"# TYPE {name} gauge\n{''.join(lines)}" for name, lines in samples.items())


def _samples(row: Row, trained: Row) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(name, value, labels) of every number."""
    yield "row_time_s", row["time_s"], {}
    for name in _OF_RUN:
        if trained.get(name) is not None:
            yield f"run_{name}", trained[name], {}
    for name, value in row["host"].items():
        yield f"host_{name}", value, {}
    for gpu in row["gpus"]:
        labels = {"gpu": gpu["index"], "uuid": gpu["uuid"]}
        yield "gpu_lost", "lost" in gpu, labels
        for name, value in _numbers(gpu):
            yield f"gpu_{name.removeprefix('gpu_')}", value, labels
        for reason in gpu.get("throttled", []):
            yield "gpu_throttled", 1, labels | {"reason": reason}
    for rank in row["ranks"]:
        labels = {"rank": rank["rank"]}
        yield "rank_phase", 1, labels | {"phase": rank["phase"]}
        for name, value in _numbers(rank):
            yield f"rank_{name}", value, labels


def _numbers(values: Row) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, int | float) and name not in _NAMES and name != "lost":
            yield name, value


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
