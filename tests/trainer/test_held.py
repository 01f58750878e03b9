"""A folder lives as long as its process, however that ends. Folders of living processes and of other users stay."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from tests.distributed import run_ranks
from trainer.host import held
from trainer.host.held import HeldFolder, remove_left
from trainer.host.node_name import node_name

PREFIX = "muster-test-"


def be_killed(parent: str) -> None:
    (HeldFolder(Path(parent), PREFIX).path / "some").write_bytes(b"1")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, be_killed, str(tmp_path))
    (found,) = tmp_path.iterdir()
    assert found.name.startswith(f"{PREFIX}{node_name()}-")
    return found


def test_what_a_killed_process_left_goes_with_the_next_and_what_lives_stays(left: Path, tmp_path: Path) -> None:
    elsewhere = left.with_name(f"{PREFIX}another_node-1")  # its locks may not be visible here
    elsewhere.mkdir()
    other_kind = left.with_name(left.name.replace(PREFIX, "muster-cache-"))
    other_kind.mkdir()
    mine, other = HeldFolder(tmp_path, PREFIX), HeldFolder(tmp_path, PREFIX)
    remove_left(tmp_path, PREFIX)
    assert {*tmp_path.iterdir()} == {mine.path, other.path, elsewhere, other_kind}
    mine.remove()
    other.remove()
    assert {*tmp_path.iterdir()} == {elsewhere, other_kind}


def test_another_users_folder_and_a_link_stay(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").touch()
    link = left.with_name(f"{left.name}-link")
    link.symlink_to(target)
    with monkeypatch.context() as as_another:
        as_another.setattr(held.os, "geteuid", lambda: os.getuid() + 1)
        remove_left(tmp_path, PREFIX)
        assert left.exists()
    remove_left(tmp_path, PREFIX)
    assert not left.exists()
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["precious"]


@pytest.mark.parametrize("before", ["open", "lock"])
def test_a_folder_that_was_removed_before_it_was_locked_is_made_again(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another start may look at this moment, and find it unlocked."""
    place = held.os if before == "open" else held
    real, removed = getattr(place, before), []

    def too_late(*arguments: Any, **words: Any) -> Any:
        if not removed:
            removed.extend(tmp_path.iterdir())
            shutil.rmtree(removed[0])
        return real(*arguments, **words)

    monkeypatch.setattr(place, before, too_late)
    mine = HeldFolder(tmp_path, PREFIX)
    monkeypatch.undo()
    assert len(removed) == 1
    assert {*tmp_path.iterdir()} == {mine.path} != {*removed}
    other = HeldFolder(tmp_path, PREFIX)
    remove_left(tmp_path, PREFIX)
    assert mine.path.exists()
    other.remove()


def test_without_a_place_for_temporary_files_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"no temporary folder can be made .*gone.*: free some space, or set TMPDIR"):
        HeldFolder.temporary(PREFIX)
