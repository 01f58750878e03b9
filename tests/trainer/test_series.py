"""What is drawn: TensorBoard's and W&B's own files after a run that was restarted, and what these must not hold."""

from __future__ import annotations

import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from configs.config import Config
from configs.errors import UserError
from configs.load import load
from launch.run.node import run_node
from tests.distributed import run_ranks, tiny, train_here, write_config
from tests.engines import under_both
from trainer.life.entries import checkpoint_name
from trainer.life.folder import RunFolder, write_json
from trainer.life.rows import read_rows
from trainer.life.stop import StopWish
from trainer.shown.series import Readings, TensorBoard, WeightsAndBiases, check_series, open_series

SECRET = "hunter2-0123456789abcdef0123456789abcdef012"


def drawn(folder: Path, tag: str = "loss") -> list[tuple[int, float]]:
    """(step, value) as TensorBoard itself reads them."""
    found = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def records(path: Path) -> Iterator[Record]:
    """The records of a W&B file: blocks of 32 KiB with pieces of records: checksum, length, which piece it is."""
    data, place, rest = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        rest += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(rest)
            rest = b""


def sent(folder: Path) -> list[dict[str, Any]]:
    """The rows that W&B has of a run, over all its starts."""
    rows = []
    for path in sorted(folder.glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def drawn_run(folder: Path, **changes: Any) -> list[int]:
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "HOOK": SECRET}
    return run_ranks(1, train_here, tiny(folder, **changes), False, env=env)


@under_both
def test_a_run_that_was_started_again_has_each_step_once(engine: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "run__tensorboard": True,
        "run__wandb": "lab",
        "monitor__hook": f"curl -H {SECRET} example.org",
        **engine,
    }
    folder = RunFolder(tmp_path / "run")
    assert drawn_run(tmp_path, checkpoint__every_steps=4, **changes) == [0]
    shutil.rmtree(folder.checkpoints / checkpoint_name(6))  # as if it had died: 5 and 6 are made again
    time.sleep(1.0)  # the names of both files hold the second
    changes |= {"train__steps": 8, "run__accept_changes": ["train.steps", "optim.lr"], "optim__lr": 2e-3}
    assert drawn_run(tmp_path, **changes) == [0]

    rows = [row for row in read_rows(folder.metrics) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert rows[5]["loss"] != rows[7]["loss"]
    assert [step for step, _ in drawn(folder.tensorboard)] == list(range(1, 9))
    assert dict(drawn(folder.tensorboard))[6] == pytest.approx(rows[7]["loss"])  # the later value
    there = sent(folder.wandb)
    assert [row["_step"] for row in there] == list(range(1, 9))
    assert there[5]["loss"] == rows[5]["loss"]  # the earlier value: W&B takes no step back
    assert {"loss", "grad_norm", "tokens_per_s", "lr", "step_s"} <= there[7].keys()

    assert json.loads((folder.wandb / "run.json").read_text())["project"] == "lab"
    (one, two) = sorted(folder.wandb.glob("offline-run-*"))
    assert one.name.rpartition("-")[2] == two.name.rpartition("-")[2]
    text = b"".join(path.read_bytes() for path in folder.wandb.rglob("*") if path.is_file())
    assert b"seq_len" in text  # it holds the config
    for word in (SECRET.encode(), b"example.org", os.environ["HOME"].encode() + b"/", b"git@"):
        assert word not in text


def test_a_disk_that_was_full_costs_no_later_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "board", 1)
    for step in (1, 2):
        board.write(step, {"loss": float(step)})
    board.close()
    board._writer = None  # as after a failed write
    time.sleep(1.0)
    board.write(3, {"loss": 3.0})
    board.close()
    assert [step for step, _ in drawn(tmp_path / "board")] == [1, 2, 3]


def test_readings_of_the_gpus_come_once_a_window(tmp_path: Path) -> None:
    path = tmp_path / "readings.json"
    write_json(path, {"a": {"sm_pct": [1.0, 1.0]}})  # of an earlier attempt
    readings = Readings(path)
    assert readings.new() == {}
    write_json(path, {"a": {"sm_pct": [90.5, 80]}, "b": {"power_w": [300, 290.5]}})
    expected = {"gpu/a/sm_pct/mean": 90.5, "gpu/a/sm_pct/lowest": 80.0}
    assert readings.new() == expected | {"gpu/b/power_w/mean": 300.0, "gpu/b/power_w/lowest": 290.5}
    assert readings.new() == {}
    path.unlink()
    assert readings.new() == {}


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    known = metadata.version

    def version(name: str) -> str:
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("package", "change", "how"),
    [("wandb", {"run__wandb": "lab"}, "muster[wandb]"), ("tensorboard", {"run__tensorboard": True}, "tensorboard")],
)
def test_a_package_that_is_missing_is_said_before_anything_starts(
    package: str, change: dict[str, Any], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, package)
    with pytest.raises(
        UserError, match=f"run.{package} needs the package {package}, and there is none\ninstall it: pip"
    ):
        run_node(str(write_config(tmp_path, **change)), [], 2, StopWish())
    assert not (tmp_path / "run").exists()
    check_series(load("demo", ["run.tensorboard=false"]).run)  # a package that is not requested is not missed


@pytest.mark.full
def test_without_a_login_it_is_said_and_nobody_is_asked(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "trainer", str(write_config(tmp_path, run__wandb="lab"))]
    terminal, end = pty.openpty()  # where W&B would ask
    done = subprocess.run(command, env=env, stdin=end, stdout=end, stderr=end, timeout=60, check=False)
    told = os.read(terminal, 65536).decode()
    for descriptor in (terminal, end):
        os.close(descriptor)
    assert done.returncode == 2, told
    first, second = told.splitlines()[-2:]
    assert first.startswith("error: run.wandb: No API key configured.")
    assert second == "or write files only: WANDB_MODE=offline"
    assert not list((tmp_path / "run").glob("attempts/*"))


def test_a_failure_of_wandb_is_said_once_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = Config.model_validate(tiny(tmp_path, run__wandb="lab"))
    told: list[str] = []

    def refuse(*arguments: Any, **more: Any) -> None:
        raise wandb.errors.CommError("no answer\nin 30 s")

    with monkeypatch.context() as once:
        once.setattr(wandb, "init", refuse)
        (lost,) = open_series(config, RunFolder(tmp_path / "run"), 1, told.append)
        lost.write(1, {"loss": 2.0})
        lost.close()
    assert told == ["run.wandb: given up, the run goes on without: CommError: no answer"]
    (series,) = open_series(config, RunFolder(tmp_path / "run"), 1, told.append)
    assert isinstance(series, WeightsAndBiases)
    monkeypatch.setattr(series._run, "log", refuse)
    for step in (1, 2):
        series.write(step, {"loss": 2.0})
    assert len(told) == 2


@pytest.mark.parametrize(
    "bad",
    [
        "[]",
        "[1]",
        "7",
        '"a"',
        "null",
        "{",
        "\x00",
        '{"a": []}',
        '{"a": {"sm_pct": 7}}',
        '{"a": {"sm_pct": ["x", null]}}',
    ],
)
def test_readings_that_are_none_stop_no_run(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "readings.json"
    readings = Readings(path)
    path.write_text(bad)
    assert readings.new() == {}
    time.sleep(0.01)  # its time shows that a file is new
    write_json(path, {"a": {"sm_pct": [2.0, 1.0]}})
    assert readings.new() == {"gpu/a/sm_pct/mean": 2.0, "gpu/a/sm_pct/lowest": 1.0}
