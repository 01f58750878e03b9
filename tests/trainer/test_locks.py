"""Filesystems without locks: nothing fails because of that, and what only a lock could tell is not guessed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from launch.checkpoint.convert.convert import _clear, _partial
from launch.monitor.journal import Journal
from trainer.data import files
from trainer.host.held import HeldFolder, remove_left
from trainer.host.locks import lock
from trainer.life import lease as module
from trainer.life.folder import RunFolder
from trainer.life.lease import Lease


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: Any, how: int) -> None:
        raise OSError(getattr(errno, request.param), "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_held_waited_for_or_refused(tmp_path: Path) -> None:
    one, other = (os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock(one)
    with pytest.raises(BlockingIOError):
        lock(other)
    os.close(one)
    assert lock(other, wait=True)
    os.close(other)


@pytest.mark.usefixtures("no_locks")
def test_all_goes_on_without_locks(tmp_path: Path) -> None:
    Journal(tmp_path / "a.jsonl", {}, 20_000).write({"kind": "second"})
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    with files.temporary_folder(tmp_path) as folder:
        files.remove_leftovers(tmp_path)
        assert folder.is_dir()  # nobody can know whether its maker lives
    with HeldFolder(tmp_path, "left-") as own, HeldFolder(tmp_path, "left-"):
        remove_left(tmp_path, "left-")
        assert own.is_dir()
    held = Lease.take(RunFolder(tmp_path / "run"), "here", 0, print)
    with pytest.raises(UserError, match="already running"):
        Lease.take(RunFolder(tmp_path / "run"), "here", 1, print)
    held.release()


def test_a_file_is_locked_where_only_one_opened_for_writing_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFSv4, and NFS with folders: such locks hold on this node."""
    real = fcntl.flock

    def as_nfs(descriptor: int, how: int) -> None:
        for_reading = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if for_reading and stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    for is_file in (True, False):
        told = pytest.raises(UserError, match="is being written by another conversion")
        with _partial(tmp_path / "out", is_file), told:
            _clear(tmp_path / "out.partial-convert", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    Journal(tmp_path / "a.jsonl", {}, 20_000).write({"kind": "second"})
    with files.temporary_folder(tmp_path):
        files.remove_leftovers(tmp_path)
    with HeldFolder(tmp_path, "left-"):
        remove_left(tmp_path, "left-")
    held = Lease.take(RunFolder(tmp_path / "run"), "here", 0, print)
    held.release()
    descriptor = os.open(tmp_path / "a.jsonl", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):  # the lock that this test replaces
        lock(descriptor)
    os.close(descriptor)


@pytest.mark.usefixtures("no_locks")
def test_another_conversion_is_not_taken_for_dead(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial-convert"
    partial.mkdir()
    with pytest.raises(UserError, match="if you know that it has ended, remove it"):
        _clear(partial, tmp_path / "out")
    assert partial.is_dir()


@pytest.mark.usefixtures("no_locks")
def test_two_starts_do_not_both_take_over_a_dead_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start has seen the dead lease, and the first start has just put its own there."""
    folder = RunFolder(tmp_path)
    dead = Lease.take(folder, "here", 0, print)
    content = json.loads(folder.lease.read_text())
    folder.lease.write_text(json.dumps(content | {"boot_id": "an earlier one"}))
    real, first = module._refuse_living, list[Lease]()

    def first_comes_between(*arguments: Any) -> None:
        real(*arguments)
        if not first:
            first.append(dead)  # only once
            first[0] = Lease.take(folder, "here", 1, print)

    monkeypatch.setattr(module, "_refuse_living", first_comes_between)
    with pytest.raises(UserError, match="already running"):
        Lease.take(folder, "here", 2, print)
    assert first[0].is_held()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LEASE"]
