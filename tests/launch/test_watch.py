"""`launch watch`: 80 columns, a thousand GPUs in a second, and any state of the files."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.errors import UserError
from launch.look.watch import Watcher, main
from launch.monitor.rows import newest_rows
from tests.machine import takes_at_most
from tests.made_up import second
from trainer.life.attempts import End
from trainer.life.events import append_row
from trainer.life.folder import RunFolder, write_json


def a_run(root: Path, nodes: int, gpus: int = 8, seconds: int = 20, age_s: float = 0.0, **changes: Any) -> RunFolder:
    folder = RunFolder(root / "run")
    for path in (folder.gpu, folder.events, folder.attempts / "000"):
        path.mkdir(parents=True)
    append_row(folder.metrics, {"time_s": time.time(), "step": 40, "loss": 2.5, "tokens_per_s": 1.2e6, "mfu": 0.41})
    for node in range(nodes):
        head = {"kind": "node", "version": 1, "node": f"node{node:03d}"}
        rows = [head, *(second(node, gpus, age_s + seconds - n, **changes) for n in range(seconds))]
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (folder.gpu / f"node{node:03d}.jsonl").write_text(text)
        os.utime(folder.gpu / f"node{node:03d}.jsonl", (time.time() - age_s,) * 2)
    return folder


def seen(watcher: Watcher, height: int | None = None) -> str:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(watcher.look(height))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines()), text
    return text


def test_a_line_per_gpu(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 1, 2, sm_pct=25.0, throttled=["hw_thermal"])
    append_row(folder.events / "a.jsonl", {"time_s": 1e9, "attempt": 0, "event": "slow_rank", "rank": 1})
    text = seen(Watcher(folder))
    assert "run  attempt 0  running" in text
    assert "step 40  loss 2.5000  1.2 M tokens/s, MFU 41.0%" in text
    first, second = (line for line in text.splitlines() if line.startswith("node000 G"))
    assert first.split()[2:] == ["█████████", "44", "%", "61.2", "640", "61", "1755", "40", "computing"]
    assert "██▄ " in second
    assert "computing throt" in second
    assert "slow_rank attempt=0 rank=1" in text


def test_a_thousand_gpus_in_a_second(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 125)
    watchers: list[Watcher] = []
    texts: list[str] = []

    def first_look() -> None:  # it also reads what the sparklines need
        watchers.append(Watcher(folder))
        texts.append(seen(watchers[-1], height=24))

    takes_at_most(1.0, first_look)
    takes_at_most(1.0, lambda: texts.append(seen(watchers[0], height=24)))
    for text in texts:
        assert len(text.splitlines()) <= 24
        assert "are busier" in text
    assert len(seen(watchers[0]).splitlines()) > 125


def test_the_idlest_come_first_when_there_is_no_room(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 60)
    append_row(folder.gpu / "node044.jsonl", second(44, 8, 0.0) | {"gpus": [{"uuid": "x", "index": 0, "sm_pct": 2.0}]})
    nodes = [line.split()[0] for line in seen(Watcher(folder), height=20).splitlines() if line.startswith("node0")]
    assert nodes[0] == "node044"
    assert len(nodes) < 20


def test_a_lost_gpu_and_a_node_that_vanished(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 1, 2, lost=True)
    assert "LOST" in seen(Watcher(folder))
    silent = a_run(tmp_path / "other", 1, 2, age_s=100.0)
    assert "silent 1:4" in seen(Watcher(silent))


def test_half_a_row_is_not_seen_yet(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 1, 2)
    path = folder.gpu / "node000.jsonl"
    whole = newest_rows(path, "second", 1)
    with open(path, "a") as file:
        file.write(json.dumps(second(0, 2, 0.0, sm_pct=1.0))[:200])
    assert newest_rows(path, "second", 1) == whole
    assert "█████████ " in seen(Watcher(folder))


def test_a_folder_of_another_version_is_said(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 1, 2)
    (folder.gpu / "node001.jsonl").write_text('{"kind": "node", "version": 2}\n')
    text = seen(Watcher(folder)).replace("\n", "")
    assert "is of version 2, this is version 1" in text
    assert "node000 G0" in text


def test_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path, 1, 2)
    write_json(folder.attempts / "000" / "end.json", asdict(End("failed", 4, None, True, "hang")))
    assert main([str(folder.root), "--once"]) == 0
    assert "attempt 0  failed (hang)" in capsys.readouterr().out


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        main([str(tmp_path), "--once"])


def test_on_a_terminal_it_is_drawn_in_place_until_ctrl_c(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 1, 2)
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "launch", "watch", "--every", "0.2", str(folder.root)]
    env = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, env=env, stdin=end, stdout=end, stderr=end) as process:
        os.close(end)
        try:
            told, deadline = b"", time.monotonic() + 30
            while told.count(b"step 40") < 3 and time.monotonic() < deadline:
                told += os.read(terminal, 65536)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # the other end is closed
                while chunk := os.read(terminal, 65536):
                    told += chunk
            assert process.wait(10) == 0
        finally:
            process.kill()  # else a process that nobody reads would be waited for without end
    os.close(terminal)
    in_place, _, left = told.rpartition(b"\x1b[?1049l")  # the switch back from the alternate screen
    assert in_place.count(b"step 40") >= 3
    assert left.count(b"step 40") == 1
    assert b"Traceback" not in told
