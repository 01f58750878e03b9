"""A folder or a pipe in place of a file, or the reverse: exit code 2 with the path, before anything runs."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load
from launch.run.node import run_node
from tests import made_up
from tests.distributed import write_config
from tests.test_mistakes import files_below, refused
from trainer.life.folder import RunFolder, wrong_kinds
from trainer.life.stop import StopWish
from trainer.preflight import check, check_contents

FILES = [
    *("config.yaml", "metrics.jsonl", "LEASE", "STOP", "PROFILE", "slurm/job.json", "gpu/readings.json"),
    *("events/node1-rank00000.jsonl", "gpu/node1.jsonl", "wandb/run.json"),
]
FOLDERS = [
    *("attempts", "attempts/000", "checkpoints", "events", "gpu", "slurm", "slurm/lives", "tensorboard", "wandb"),
]


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """Opening a pipe would wait for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "it is a pipe, not a "),
        (a_socket, "it is a socket, not a "),
        (a_link_to_nothing, "it is a link to nothing, which is not there"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_what_is_neither_file_nor_folder_is_refused(
    name: str, make: Callable[[Path], object], what: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(UserError) as told:
        check_contents(RunFolder(tmp_path))
    assert str(told.value).startswith(f"{tmp_path / name}: ")
    assert what in str(told.value)
    (tmp_path / name).unlink()  # as advised
    check_contents(RunFolder(tmp_path))


@pytest.mark.parametrize(("names", "make"), [(FILES, Path.mkdir), (FOLDERS, Path.touch)])
def test_a_folder_for_a_file_and_the_other_way_round(
    names: list[str], make: Callable[[Path], object], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make(tmp_path / name)
        what = "it is a folder, not a file" if make is Path.mkdir else "it is a file, not a folder"
        assert wrong_kinds(RunFolder(tmp_path)) == [f"{tmp_path / name}: {what}"]
        (tmp_path / name).rmdir() if make is Path.mkdir else (tmp_path / name).unlink()


def test_links_to_what_belongs_there_are_good(tmp_path: Path) -> None:
    """Checkpoints on a larger disk, metrics on a faster one."""
    for name in ("checkpoints", "attempts"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    (tmp_path / "disk/metrics.jsonl").touch()
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoints", "attempts", "metrics.jsonl"):
        (run / name).symlink_to(tmp_path / "disk" / name)
    made_up.attempt(run, 0, None)
    check_contents(RunFolder(run))
    check_contents(RunFolder(tmp_path / "new"))


def test_all_of_them_are_named_up_to_three(tmp_path: Path) -> None:
    for name in ("attempts", "checkpoints", "events", "gpu", "wandb"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as told:
        check_contents(RunFolder(tmp_path))
    assert len(str(told.value).splitlines()) == 5
    assert "and 2 more\nmove it away, or use another run.dir" in str(told.value)


def test_what_must_not_be_seen_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.stat

    def closed(path: str | os.PathLike[str], **how: bool) -> os.stat_result:
        if str(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, **how)

    monkeypatch.setattr(os, "stat", closed)
    with pytest.raises(UserError, match="checkpoints: cannot be looked at: Permission denied"):
        check_contents(RunFolder(tmp_path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "LEASE"])
def test_a_run_and_its_launcher_refuse_it_and_touch_nothing(name: str, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    refused(tmp_path, [str(path)], f"{name}: it is a pipe, not a file", "move it away")
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=f"{name}: it is a pipe, not a file"):
        run_node(str(path), [], 1, StopWish())
    assert files_below(tmp_path) == before


def test_everything_is_asked_for_before_submitting_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.checkpoints.touch()
    (problem,) = [
        one for one in check(load(str(write_config(tmp_path)), []), 1, folder, paths=False) if "checkpoints" in one.text
    ]
    assert "it is a file, not a folder" in problem.text
