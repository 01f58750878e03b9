"""What is read from a run folder while others write to it, and whatever its files hold."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from launch.look.run_folder import all_attempts, runs_in, view
from tests import made_up
from trainer.life import rows
from trainer.life.attempts import End
from trainer.life.folder import RunFolder
from trainer.life.lease import _self_description
from trainer.life.rows import last_row, rows_backwards

_ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_JSON = st.recursive(_ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
_KEYS = [
    *("time_s", "start_step", "last_step", "hosts", "environment", "reason", "cause", "step", "requeue", "attempt"),
    *("loss", "tokens_per_s", "step_s", "job", "node", "pid", "started_s", "boot_id", "pid_namespace", "SLURM_JOB_ID"),
]
_OURS = st.dictionaries(st.sampled_from(_KEYS), _JSON | st.dictionaries(st.sampled_from(_KEYS), _ATOMS))
_CONTENT = st.binary(max_size=20) | (_JSON | _OURS).map(lambda data: json.dumps(data).encode())


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_CONTENT, min_size=7, max_size=7))
def test_whatever_lies_there_is_read(contents: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number in ("000", "001"):
            (root / "attempts" / number).mkdir(parents=True)
        (root / "slurm/lives/7-0").mkdir(parents=True)
        names = ["attempts/000/start.json", "attempts/001/end.json", "metrics.jsonl", "LEASE", "slurm/job.json"]
        names += ["slurm/lives/7-0/outcome.json"]
        for name, content in zip([*names, "attempts/001/start.json"], contents, strict=True):
            (root / name).write_bytes(content)
        found = view(root)
        assert (found.attempts, len(all_attempts(found.folder))) == (2, 2)
        assert all(isinstance(number, str) for number in found.jobs)


_LINES = st.sampled_from(
    [b'{"loss": 1, "attempt": 0}', b'{"loss": null, "attempt": 1}', b'{"step": 2}', b"{", b"", b"[1]"]
)


@given(st.lists(_LINES, max_size=12), st.integers(0, 30), st.integers(1, 40))
def test_rows_from_the_end_are_the_rows_from_the_start(lines: list[bytes], cut: int, block: int) -> None:
    data = b"\n".join(lines)[: -cut or None]  # the last row may be half written
    expected: list[dict[str, Any]] = []
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        expected += [row] if isinstance(row, dict) else []
    with tempfile.TemporaryDirectory() as place, patch.object(rows, "_BLOCK_BYTES", block):
        path = Path(place) / "rows"
        path.write_bytes(data)
        assert list(rows_backwards(path)) == expected[::-1]
        with_loss = [row for row in expected if "loss" in row]
        assert last_row(path, "loss") == (with_loss[-1] if with_loss else {})
        of_one = [row for row in with_loss if row["attempt"] == 1]
        assert last_row(path, "loss", 1) == (of_one or with_loss or [{}])[-1]


def test_a_whole_run(tmp_path: Path) -> None:
    made_up.attempt(tmp_path, 0, End("stopped", 40, "step-00000040", True, "warning"), job="17")
    made_up.attempt(tmp_path, 1, None, job="17", start_step=40)
    made_up.rows(tmp_path, range(1, 61))
    made_up.rows(tmp_path, range(41, 50), number=1)
    made_up.rows(tmp_path, range(61, 63))  # a rank that outlived attempt 0
    (tmp_path / "metrics.jsonl").open("a").write('{"time_s": 1.0, "attempt": 1, "step": 50, "lo')
    made_up.checkpoint(tmp_path, 20, age_s=900)
    made_up.checkpoint(tmp_path, 40)
    made_up.lease(tmp_path, "17")
    found = view(tmp_path)
    assert (found.attempts, found.row["step"], found.row["attempt"]) == (2, 49, 1)
    assert found.checkpoint_step == 40
    assert found.before is not None
    assert (found.before.reason, found.before.cause, found.before.requeue) == ("stopped", "warning", True)
    assert found.newest is not None
    assert (found.newest.start_step, found.newest.reason, found.newest.hosts) == (40, None, ("node1", "node2"))
    assert found.jobs == ["17"]
    assert found.holder is not None
    assert found.holder.alive is None  # on another node, about which nothing is known here


def test_whether_the_holder_lives(tmp_path: Path) -> None:
    mine = _self_description("here", 0)
    made_up.lease(tmp_path, **(mine | {"job": None}))
    holder = view(tmp_path).holder
    assert holder is not None
    assert holder.alive is True
    child = psutil.Popen(["true"])
    child.wait()
    made_up.lease(tmp_path, **(mine | {"job": None, "pid": child.pid}))
    holder = view(tmp_path).holder
    assert holder is not None
    assert holder.alive is False


@pytest.mark.parametrize("pid", [-1, 0, 2**62, "7", None])
def test_a_holder_without_a_pid_that_can_be(pid: object, tmp_path: Path) -> None:
    made_up.lease(tmp_path, **(_self_description("here", 0) | {"job": None, "pid": pid}))
    holder = view(tmp_path).holder
    assert holder is not None
    assert not holder.alive


def test_which_folders_are_runs(tmp_path: Path) -> None:
    made_up.attempt(tmp_path / "b", 0, None)
    made_up.submitted(tmp_path / "a", "1")
    (tmp_path / "slurm").mkdir()  # as in a checkout of this project
    assert runs_in(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert runs_in(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(UserError, match="No such file"):
        runs_in(tmp_path / "nothing")


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    made_up.attempt(tmp_path, 0, None)
    with patch.object(os, "scandir", side_effect=PermissionError(13, "Permission denied", "there")):
        made_up.checkpoint(tmp_path, 1)
        with pytest.raises(UserError, match="there: Permission denied"):
            view(tmp_path)


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    """Reading only the end matters: a metrics file may have gigabytes."""
    made_up.attempt(tmp_path, 0, None)
    path = RunFolder(tmp_path).metrics
    with open(path, "wb") as file:
        file.truncate(50 * 2**30)  # a hole: reading all of it would take minutes
    made_up.rows(tmp_path, range(5))
    assert view(tmp_path).row["step"] == 4
