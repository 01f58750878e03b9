"""The entries of checkpoints/: runs and all verbs share one reader. Links are followed; their targets never change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from launch.__main__ import main
from launch.checkpoint.text import open_named
from tests.distributed import run_ranks, tiny, train_here, write_config
from tests.test_mistakes import refused
from trainer.begin import named_checkpoint
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.keep.recover import recover
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.life.entries import Kind, committed_steps, entries, newest_checkpoint
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows


def save(root: Path, *steps: int, **keep: int) -> list[str]:
    """Commit these steps; returns the printed lines."""
    said: list[str] = []
    store = CheckpointStore(root, keep=KeepSection(**({"last": 9} | keep)), asynchronous=False, say=said.append)
    for step in steps:
        tensor = torch.full((40,), float(step))
        store.save(step, [Piece("a", "model", tensor, (40,), (0,), (40,))], RunState({"consumed_samples": step}), None)
        assert [result.error for result in store.poll()] == [None]
    return said


def shelf_of(root: Path, said: list[str] | None = None, last: int = 9) -> Shelf:
    return Shelf(root, KeepSection(last=last), (said if said is not None else []).append)


def move_away(path: Path, disk: Path) -> Path:
    """Move a checkpoint to a larger disk, and link it back."""
    disk.mkdir(exist_ok=True)
    shutil.move(path, disk / path.name)
    path.symlink_to(disk / path.name)
    return disk / path.name


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("/not/mounted/step-00000009")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_link_to_a_file(path: Path) -> None:
    (path.parent / "notes").touch()
    path.symlink_to("notes")


def a_file(path: Path) -> None:
    path.touch()


UNUSABLE: list[tuple[str, Callable[[Path], object], str]] = [
    ("step-00000009", a_link_to_nothing, "which is not there"),
    ("step-00000009", a_link_to_itself, "which cannot be followed: Too many levels of symbolic links"),
    ("step-00000009", a_link_to_a_file, "it is a link to notes, a file, not a folder"),
    ("step-00000009", a_file, "it is a file, not a folder"),
    ("step-00000009", os.mkfifo, "it is a pipe, not a folder"),
    ("step-0000000９", Path.mkdir, "no checkpoint has such a name"),  # a digit that int() accepts
    ("step-000000009", Path.mkdir, "no checkpoint has such a name"),
    ("step-9", Path.mkdir, "no checkpoint has such a name"),
]


@pytest.mark.parametrize(("name", "make", "why"), UNUSABLE)
def test_no_run_goes_on_beside_what_may_be_newer(
    name: str, make: Callable[[Path], object], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    make(root / name)
    for why_it_matters in ("there is no other", "it may be newer than step 4"):
        with pytest.raises(UserError) as told:
            shelf_of(root).newest_good()
        said, advice = str(told.value).splitlines()
        assert said.startswith(f"{root / name} is no usable checkpoint (")
        assert said.endswith(f"{why}), and {why_it_matters}")
        assert advice == f"mend it, or move it out of {root}"
        assert (root / name).exists() or (root / name).is_symlink()
        with pytest.raises(UserError, match="is no usable checkpoint"):
            named_checkpoint(tmp_path)
        save(root, *{4} - set(committed_steps(root)))
    # All verbs report the same, and none is stopped by it.
    assert main(["checkpoint", "list", str(tmp_path)]) == 1
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    with pytest.raises(UserError, match="is no usable checkpoint"):
        newest_checkpoint(root)
    told_by_verbs = capsys.readouterr().out
    assert told_by_verbs.count(why) == 2
    # The advice works.
    (root / name).rename(tmp_path / "elsewhere")
    found = shelf_of(root).newest_good()
    assert found is not None
    assert found.step == 4


def test_what_is_older_or_has_another_name_stops_nothing(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (tmp_path / "step-00000002").symlink_to("nowhere")
    (tmp_path / "step-00000009.tar").touch()
    (tmp_path / "notes").touch()
    found = shelf_of(tmp_path).newest_good()
    assert found is not None
    assert found.step == 4
    assert {e.path.name: e.kind for e in entries(tmp_path)} == {
        "step-00000002": Kind.UNUSABLE,
        "step-00000004": Kind.COMMITTED,
        "step-00000009.tar": Kind.UNUSABLE,
    }
    shutil.rmtree(tmp_path / "step-00000004")
    with pytest.raises(UserError) as told:  # the archive may hold all that the run had
        shelf_of(tmp_path).newest_good()
    old, archive = (
        f"{tmp_path / 'step-00000002'} is no usable checkpoint (it is a link to nowhere, which is not there)",
        f"{tmp_path / 'step-00000009.tar'} is no usable checkpoint (no checkpoint has such a name)",
    )
    assert str(told.value) == (f"{old}, {archive}, and there is no other\nmend them, or move them out of {tmp_path}")


def test_a_checkpoint_behind_a_link_is_read_and_nothing_there_changes(tmp_path: Path) -> None:
    root, said = tmp_path / "c", list[str]()
    save(root, 1, 2, 3)
    there = move_away(root / "step-00000003", tmp_path / "large disk")
    before = content(tmp_path / "large disk")
    shelf = shelf_of(root, said, last=1)
    found = shelf.newest_good()
    assert found is not None
    assert found.step == 3
    assert torch.equal(found.read("a"), torch.full((40,), 3.0))
    assert shelf.going() == [1, 2]  # it counts among the last
    save(root, 4, last=1)
    assert committed_steps(root) == [3, 4]  # a link is not deleted, as its bytes may be another run's
    # A bad checkpoint there is set aside by name alone; its files are not written.
    shutil.copytree(there, root / "step-00000003.bad-7")  # a good copy, which could repair it
    (there / "model/rank-00000.safetensors").rename(tmp_path / "hidden")
    with pytest.raises(BadCheckpoint, match="not this run's, so it is left as it is"):
        recover(root / "step-00000003", root, (), said.append)
    shutil.rmtree(root / "step-00000004")
    save(root, 2)
    assert shelf_of(root, said).newest_good() is not None
    assert [e.path.name for e in entries(root)] == ["step-00000002", *(f"step-00000003.bad-{k}" for k in "07")]
    assert (root / "step-00000003.bad-0").is_symlink()
    (tmp_path / "hidden").rename(there / "model/rank-00000.safetensors")
    assert content(tmp_path / "large disk") == before


def test_prune_names_the_links_that_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1, 2, 3)
    move_away(root / "step-00000001", tmp_path / "disk")
    (root / "step-00000002").rename(root / "step-00000002.bad-0")
    move_away(root / "step-00000002.bad-0", tmp_path / "disk")
    before = content(tmp_path / "disk")
    assert main(["checkpoint", "prune", str(tmp_path), "--last", "1", "--bad", "--yes"]) == 0
    told = capsys.readouterr().out
    assert "step-00000001 stays: it is a link" in told
    assert "step-00000002.bad-0 stays: it is a link" in told
    assert content(tmp_path / "disk") == before
    assert sorted(os.listdir(root)) == ["step-00000001", "step-00000002.bad-0", "step-00000003"]


def test_prune_waits_for_no_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoints", 1)
    os.mkfifo(tmp_path / "config.yaml")
    assert main(["checkpoint", "prune", str(tmp_path), "--dry-run"]) == 2
    assert "say --last N" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(tmp_path), "--dry-run", "--last", "1"]) == 0


def test_nothing_is_deleted_while_a_newer_one_cannot_be_used(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000003").symlink_to("/not/mounted")
    said: list[str] = []
    assert shelf_of(tmp_path, said, last=1).prune("000") == []
    assert len(said) == 1
    assert "step-00000003: it is a link to /not/mounted" in said[0]


def test_leftovers_are_removed_without_following_a_link(tmp_path: Path) -> None:
    save(tmp_path / "c", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept").touch()
    (tmp_path / "c/step-00000005.partial-000-1/model").mkdir(parents=True)
    (tmp_path / "c/step-00000005.partial-000-1/optim").symlink_to(tmp_path / "mine")
    (tmp_path / "c/step-00000006.deleting-000").symlink_to(tmp_path / "mine")
    assert shelf_of(tmp_path / "c").clean() == ["step-00000005.partial-000-1"]
    assert sorted(os.listdir(tmp_path / "c")) == ["step-00000004", "step-00000006.deleting-000"]
    disk.remove_tree(str(tmp_path / "c/step-00000006.deleting-000"))
    assert sorted(os.listdir(tmp_path / "c")) == ["step-00000004"]
    assert (tmp_path / "mine/kept").exists()


def test_no_verb_looks_into_what_a_link_leads_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to `/` would make a verb count all files of the machine."""
    root, looked_at = tmp_path / "run/checkpoints", list[str]()
    root.mkdir(parents=True)
    save(root, 4)
    (tmp_path / "disk/deep/deeper").mkdir(parents=True)
    (root / "step-00000009").symlink_to(tmp_path / "disk")
    usual = os.scandir

    def counting(path: str | os.PathLike[str]) -> object:
        looked_at.append(os.fspath(path))
        return usual(path)

    with patch.object(os, "scandir", counting):
        assert main(["checkpoint", "list", str(tmp_path / "run")]) == 1
        assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 1
    assert not any("deep" in path for path in looked_at)
    assert capsys.readouterr().out.count("the file is missing") == 2
    said: list[str] = []
    found = shelf_of(root, said).newest_good()  # a folder without a checkpoint is a bad one, as always
    assert found is not None
    assert found.step == 4
    assert "set aside as step-00000009.bad-0" in said[0]


def test_a_folder_whose_name_is_not_its_step_is_bad_to_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "checkpoints"
    save(root, 4)
    shutil.copytree(root / "step-00000004", root / "step-00000009")
    (root / "step-00000008").symlink_to("step-00000004")
    assert main(["checkpoint", "list", str(tmp_path)]) == 1
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert main(["checkpoint", "verify", str(root / "step-00000009")]) == 1
    assert capsys.readouterr().out.count("it holds step 4") == 5
    for path in (tmp_path, root / "step-00000009", root / "step-00000008"):
        with pytest.raises(UserError, match="it holds step 4"):
            open_named(path)
        with pytest.raises(UserError, match="it holds step 4"):
            named_checkpoint(path)
    found = shelf_of(root).newest_good()
    assert found is not None
    assert found.step == 4
    (root / "step-00000009.bad-0").rename(tmp_path / "copy")  # a copy may have any name except that of another step
    assert main(["checkpoint", "verify", str(tmp_path / "copy")]) == 0


def test_a_run_goes_on_from_a_linked_checkpoint_and_never_past_a_broken_one(tmp_path: Path) -> None:
    changes = {
        "checkpoint__every_steps": 2,
        "checkpoint__keep__last": 9,
        "train__steps": 4,
        "optim__schedule": "constant",
    }
    config, run = tiny(tmp_path, **changes), tmp_path / "run"
    assert run_ranks(1, train_here, config, False) == [0]
    there = move_away(RunFolder(run).checkpoints / "step-00000004", tmp_path / "disk")
    config["train"]["steps"] = 6
    assert run_ranks(1, train_here, config, False) == [0]
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "lr" in row][-2:] == [5, 6]
    shutil.rmtree(RunFolder(run).checkpoints / "step-00000006")
    there.rename(tmp_path / "not mounted")
    path = write_config(tmp_path, **{**changes, "train__steps": 6})
    said = ("step-00000004 is no usable checkpoint (it is a link to", "it may be newer than step 2", "move it out of")
    refused(tmp_path, [str(path)], *said)
