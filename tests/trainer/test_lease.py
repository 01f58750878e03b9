"""One writer per run folder: which start is refused, and which lease is taken over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.errors import UserError
from trainer.host.clock import started_ticks
from trainer.life.folder import RunFolder
from trainer.life.lease import Lease


def held_by(folder: RunFolder, pid: int, **changes: Any) -> None:
    """Make the lease look like that of another process on this node."""
    lease = Lease.take(folder, "here", 0, print)
    holder = json.loads(lease.path.read_text())
    its = {"pid": pid, "started_ticks": started_ticks(pid), "token": "theirs"}
    lease.path.write_text(json.dumps(holder | its | changes))


def test_a_living_holder_is_refused_and_a_dead_one_succeeded(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), list[str]()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        held_by(folder, other.pid)
        with pytest.raises(UserError, match=f"already running \\(pid {other.pid} on here\\)"):
            Lease.take(folder, "here", 1, said.append)
        other.kill()
        # Killed but not waited for: a zombie, as in a container without an init.
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        lease = Lease.take(folder, "here", 1, said.append)
    assert said == [f"taking over {tmp_path}: pid {other.pid} on here is gone"]
    lease.release()
    assert not folder.lease.exists()


def test_another_process_with_the_same_pid_is_no_holder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    held_by(folder, psutil.Process().pid, started_ticks=1)
    Lease.take(folder, "here", 1, print)


@pytest.mark.parametrize("other", [{"boot_id": "x", "node": "there"}, {"pid_namespace": "pid:[1]"}])
def test_a_holder_that_cannot_be_asked_is_not_overrun(other: dict[str, str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    held_by(folder, psutil.Process().pid, **other)
    with pytest.raises(UserError, match="cannot be asked from here"):
        Lease.take(folder, "here", 1, print)


def test_before_the_last_boot_is_long_ago(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    held_by(folder, psutil.Process().pid, boot_id="an earlier one")
    Lease.take(folder, "here", 1, print)


def test_a_lease_that_was_taken_over_is_not_released(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lease = Lease.take(folder, "here", 0, print)
    lease.path.write_text(json.dumps({"token": "theirs"}))
    lease.release()
    assert folder.lease.exists()


def test_a_lease_cut_short_by_a_crash_is_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.lease.write_text('{"token": ')
    Lease.take(folder, "here", 0, print).release()
    assert not folder.lease.exists()


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("echo RUNNING", "already running"),
        ("echo PENDING", "already running"),  # requeued: it comes back for its folder
        ('[ "$SQUEUE_PARTITION" ] || echo RUNNING', "already running"),  # a person's display settings must hide no job
        ("echo CANCELLED", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "cannot be asked from here"),
    ],
)
def test_slurm_is_asked_for_a_holder_on_another_node(
    says: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    folder = RunFolder(tmp_path / "run")
    held_by(folder, psutil.Process().pid, boot_id="x", node="there", job="7")
    if told is None:
        Lease.take(folder, "here", 1, print)
        return
    with pytest.raises(UserError, match=told):
        Lease.take(folder, "here", 1, print)


def test_the_other_nodes_find_the_lease_of_their_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "7"), ("STEP_ID", "0"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    folder = RunFolder(tmp_path)
    first = Lease.take(folder, "node1", 0, print)
    found = Lease.of_first_node(folder, "node1", "node2", 1.0, lambda: False, print)
    assert found is not None
    assert found.token == first.token
    for name, value in (("JOB_ID", "8"), ("STEP_ID", "1"), ("RESTART_COUNT", "0")):
        with monkeypatch.context() as changed:  # another job, step or life does not match
            changed.setenv(f"SLURM_{name}", value)
            with pytest.raises(UserError, match=r"node2: node1 has not taken .* every node sees"):
                Lease.of_first_node(folder, "node1", "node2", 0.0, lambda: False, print)
            # told to end, it does not wait until Slurm kills it
            assert Lease.of_first_node(folder, "node1", "node2", 60.0, lambda: True, print) is None
