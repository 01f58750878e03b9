"""`python -m launch checkpoint convert` as a person types it, and its messages for wrong input."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from launch.__main__ import main
from tests.nobody import as_nobody
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.manifest import digest

GOLDEN = Path(__file__).parent.parent / "trainer" / "checkpoint" / "golden" / "step-00000500"

pytestmark = pytest.mark.filterwarnings("ignore")


def test_each_kind_into_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kind is detected or given. `diff` compares the results, and the source does not change."""
    before = {path: path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()}
    sources = {"muster": GOLDEN}
    for kind in ("torch", "dcp"):
        sources[kind] = tmp_path / kind
        assert main(["checkpoint", "convert", str(GOLDEN), str(sources[kind]), "--to", kind]) == 0
    for kind, source in sources.items():
        for to in sources:
            target = tmp_path / f"{kind}-{to}"
            words = ["convert", str(source), str(target), "--to", to, *(["--from", kind] if to == "dcp" else [])]
            assert main(["checkpoint", *words]) == 0
            assert main(["checkpoint", "diff", str(GOLDEN), str(target)]) == 0
    told = capsys.readouterr().out
    assert "muster, step 500, 18 parameters (1 tied), 3 tensors of optimizer state" in told or "step 500" in told
    assert {path: path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()} == before


def wrong(capsys: pytest.CaptureFixture[str], folder: Path, *words: object) -> str:
    """Check that the command is refused in one or two lines and the folder is unchanged. Returns the message."""
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    assert main(["checkpoint", "convert", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) <= 2, told
    assert sorted(path.name for path in folder.iterdir()) == before
    return told


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "torch")


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    assert "a folder without a checkpoint" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "torch")


def test_files_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zipfile

    (tmp_path / "a").write_text("hello")
    assert "a file of another kind" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "dcp")
    (tmp_path / "a").write_bytes(b"")
    assert "a file of another kind" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "dcp")
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("a/text", "hello")
    assert "not an archive of torch.save" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "dcp")
    torch.save([1, 2], tmp_path / "a")
    assert "holds a list" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "dcp")
    torch.save({"epoch": 3}, tmp_path / "a")
    assert "no tensors" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "dcp")
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a")
    assert "ComplexFloatStorage" in wrong(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "--to", "dcp")


def test_unknown_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--to", "zip"], ["--to", "torch", "--from", "zip"]):
        assert main(["checkpoint", "convert", str(GOLDEN), str(tmp_path / "b"), *words]) == 2
        assert "invalid choice: 'zip'" in capsys.readouterr().err
    told = wrong(capsys, tmp_path, GOLDEN, tmp_path / "b", "--to", "torch", "--from", "dcp")
    assert "--from dcp was said, but this is a Muster checkpoint" in told


def test_no_permission(open_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path = open_path
    shutil.copytree(GOLDEN, tmp_path / "m")
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "d", no_dist=True)
    (tmp_path / "closed").mkdir(mode=0o700)
    shutil.copytree(GOLDEN, tmp_path / "closed" / "m")
    for path in (tmp_path / "a.pt", tmp_path / "m" / "manifest.json", tmp_path / "d" / ".metadata"):
        path.chmod(0)
    with as_nobody():
        for source in ("a.pt", "m", "d", "closed", "closed/m"):
            told = wrong(capsys, tmp_path, tmp_path / source, tmp_path / "b", "--to", "torch")
            assert "ermission" in told, source
        for target in ("closed/b", "closed/c/b"):
            assert "ermission" in wrong(capsys, tmp_path, GOLDEN, tmp_path / target, "--to", "torch")
    (tmp_path / "closed").chmod(0o755)
    with as_nobody():
        for to in ("muster", "torch", "dcp"):
            told = wrong(capsys, tmp_path, GOLDEN, tmp_path / "closed" / "b", "--to", to)
            assert "cannot be written: Permission denied" in told


def test_a_target_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        for to in ("muster", "torch", "dcp"):
            assert "is there already" in wrong(capsys, tmp_path, GOLDEN, tmp_path / name, "--to", to)
    assert (tmp_path / "file").read_text() == "mine"
    told = wrong(capsys, tmp_path, GOLDEN, tmp_path / "no" / "where", "--to", "dcp")
    assert "there is no folder" in told


def test_a_target_inside_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN, tmp_path / "m")
    (tmp_path / "link").symlink_to("m")
    for target in ("m/b", "m/optim/b", "link/b", "m/../m/b"):
        assert "inside" in wrong(capsys, tmp_path, tmp_path / "m", tmp_path / target, "--to", "torch")
    assert sorted(os.listdir(tmp_path / "m")) == sorted(os.listdir(GOLDEN))


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is written, or met on the way: nothing is left behind."""
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
        assert "nothing was written" in wrong(capsys, tmp_path, GOLDEN, tmp_path / "b", "--to", "torch")

    def full(operation: disk.Operation) -> Any:
        if operation.name == "write" and operation.offset > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return nullcontext()

    monkeypatch.setattr(disk, "observer", full)
    for to in ("muster", "torch", "dcp"):
        told = wrong(capsys, tmp_path, GOLDEN, tmp_path / "b", "--to", to)
        assert "the disk is full; nothing of it was left" in told


def test_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save({"model": {"w": torch.arange(5000.0)}}, checkpoint_id=tmp_path / "d", no_dist=True)
    (payload,) = (tmp_path / "d").glob("*.distcp")
    size = payload.stat().st_size
    for left in (size - 1, 1000, 0):
        os.truncate(payload, left)
        told = wrong(capsys, tmp_path, tmp_path / "d", tmp_path / "b", "--to", "muster")
        assert f"{payload} (model.w): cut short: bytes 0 to {size} are wanted, it has {left}" in told
    payload.unlink()
    assert "No such file" in wrong(capsys, tmp_path, tmp_path / "d", tmp_path / "b", "--to", "muster")
    metadata = (tmp_path / "d" / ".metadata").read_bytes()
    (tmp_path / "d" / ".metadata").write_bytes(metadata[:-20])
    assert "not a pickle" in wrong(capsys, tmp_path, tmp_path / "d", tmp_path / "b", "--to", "muster")
    torch.save({"w": torch.arange(5000.0)}, tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", 15000)
    assert "cut short" in wrong(capsys, tmp_path, tmp_path / "a.pt", tmp_path / "b", "--to", "muster")


def test_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN, tmp_path / "m")
    (path, *_) = sorted((tmp_path / "m" / "model").iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    told = wrong(capsys, tmp_path, tmp_path / "m", tmp_path / "b", "--to", "torch")
    assert f"{path} (bytes 0 to " in told
    assert "nothing was written" in told


def test_format_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN, tmp_path / "m")
    path = tmp_path / "m" / "manifest.json"
    body = path.read_bytes().replace(b'"format":1', b'"format":2', 1)
    body = body[: body.rindex(b',"digest"')]
    path.write_bytes(body + b',"digest":"' + digest(body + b',"digest":""}\n').encode() + b'"}\n')
    told = wrong(capsys, tmp_path, tmp_path / "m", tmp_path / "b", "--to", "torch")
    assert "not of format 1, the only one that this version of Muster reads" in told


def test_another_conversion_to_the_same_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversion that runs is not disturbed, and the rest of a killed one is removed."""
    import fcntl

    partial = tmp_path / "b.partial-convert"
    (partial / "model").mkdir(parents=True)
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another conversion" in wrong(capsys, tmp_path, GOLDEN, tmp_path / "b", "--to", "torch")
    os.close(descriptor)
    assert main(["checkpoint", "convert", str(GOLDEN), str(tmp_path / "b"), "--to", "torch"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
