"""Hostile input in checkpoints: pickles that would run code, archives and numbers that are false, damaged bytes.

Each hostile pickle would create a file. PyTorch's own way of opening is tried too, which shows that the test can fail.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from configs.errors import UserError
from launch.__main__ import main
from launch.checkpoint.convert.convert import open_state
from launch.checkpoint.convert.state import Range, stream
from launch.checkpoint.convert.unpickle import Enumeration, Names, unpickle

pytestmark = pytest.mark.filterwarnings("ignore")


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def refused(source: Path, target: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Check that convert and diff refuse, in at most two lines, and that nothing was run or left behind."""
    capsys.readouterr()
    for verb in (["convert", str(source), str(target), "--to", "muster"], ["diff", str(source), str(source)]):
        assert main(["checkpoint", *verb]) == 2
        told = capsys.readouterr().err
        assert len(told.splitlines()) <= 2, told
        assert "Traceback" not in told
    assert not mark.exists()
    assert not target.exists()
    assert not list(target.parent.glob("*.partial*"))
    return told


def replaced(archive: Path, name: str, content: bytes) -> None:
    """Replace a record of the archive."""
    with zipfile.ZipFile(archive) as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(archive, "w") as new:
        for record, old_content in records.items():
            new.writestr(record, content if record.endswith(name) else old_content)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    content = pickle.dumps({"model": {"w": Hostile(mark)}}, protocol)
    with pytest.raises(UserError, match="refused, nothing of it was run"):
        unpickle("x", content)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


def test_a_hostile_file_of_torch_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    torch.save({"model": {"w": torch.ones(2)}, "extra": Hostile(mark)}, path)
    told = refused(path, tmp_path / "m", mark, capsys)
    assert f"{os.mkdir.__module__}.mkdir" in told
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_bare_pickle_called_pt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Hostile(mark), 2))
    refused(path, tmp_path / "m", mark, capsys)
    torch.save({"w": Hostile(mark)}, path, _use_new_zipfile_serialization=False)
    refused(path, tmp_path / "m", mark, capsys)


def dcp_folder(folder: Path, **more: Any) -> Path:
    dcp.save({"model": {"w": torch.arange(12.0).reshape(3, 4)}, **more}, checkpoint_id=folder, no_dist=True)
    return folder


def test_hostile_metadata_of_dcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, mark = dcp_folder(tmp_path / "d"), tmp_path / "ran"
    with (folder / ".metadata").open("rb") as file:
        good: Metadata = pickle.load(file)
    for content in (
        Hostile(mark),
        Metadata({"model.w": Hostile(mark)}, storage_data={}),
        {**vars(good), "x": Hostile(mark)},
    ):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        refused(folder, tmp_path / "m", mark, capsys)
    good.planner_data = Hostile(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(good))
    refused(folder, tmp_path / "m", mark, capsys)
    dcp.FileSystemReader(folder).read_metadata()
    assert mark.exists()


def test_hostile_value_in_a_distcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "ran"
    folder = dcp_folder(tmp_path / "d", extra=Hostile(mark))
    refused(folder, tmp_path / "m", mark, capsys)
    dcp.load({"extra": None}, checkpoint_id=folder, no_dist=True)
    assert mark.exists()


def test_hostile_tensor_in_a_distcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another archive stands where a tensor should be."""
    folder, mark = dcp_folder(tmp_path / "d"), tmp_path / "ran"
    with (folder / ".metadata").open("rb") as file:
        metadata: Metadata = pickle.load(file)
    (info,) = metadata.storage_data.values()
    archive = io.BytesIO()
    torch.save(Hostile(mark), archive)
    (folder / info.relative_path).write_bytes(archive.getvalue())
    info.offset, info.length = 0, len(archive.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "refused, nothing of it was run" in refused(folder, tmp_path / "m", mark, capsys)


def test_paths_stay_inside_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dcp_folder(tmp_path / "d")
    shutil.copytree(folder, tmp_path / "other")
    with (folder / ".metadata").open("rb") as file:
        metadata: Metadata = pickle.load(file)
    (info,) = metadata.storage_data.values()
    for name in (f"../other/{info.relative_path}", str(tmp_path / "other" / info.relative_path), "a/../../x", ""):
        info.relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        assert "not the name of a file in the folder" in refused(folder, tmp_path / "m", tmp_path / "ran", capsys)


# Pickles of opcodes that no pickler writes. They change an object of the reader, or call what is no function.
OPCODES = [
    pytest.param(b"\x80\x02ctorch\nSize\n}X\x08\x00\x00\x00functionNsb.", id="state of a callable"),
    pytest.param(b"\x80\x02ctorch\nSize\nN}X\x08\x00\x00\x00functionNs\x86b.", id="slots of a callable"),
    pytest.param(b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aNs\x86b.", id="attributes of a type"),
    pytest.param(b"\x80\x02ccollections\nOrderedDict\nctorch\nSize\nR.", id="a callable as an argument"),
    pytest.param(b"\x80\x02ctorch\nfloat32\n)R.", id="calling a dtype"),
    pytest.param(b"\x80\x02ctorch.storage\nUntypedStorage\n)R.", id="calling a storage type"),
    pytest.param(b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", id="eval"),
    pytest.param(b"c__builtin__\neval\n(V1\ntR.", id="eval of python 2"),
    pytest.param(b"\x80\x02ctorch\nload\n)R.", id="torch.load"),
    pytest.param(b"\x80\x04\x8c\x05torch\x8c\x0bSize.__init__\x93.", id="a dotted name"),
    pytest.param(b"\x80\x02}(X\x01\x00\x00\x00ah\x05u.", id="a memo that is not there"),
    pytest.param(b"\x80\x02K\x01Q.", id="an unknown reference"),
    pytest.param(b"\x80\x02" + b"(" * 100000, id="deep"),
    pytest.param(b"\x80\x02\x82\x01.", id="an extension"),
    pytest.param(b"cbuiltins\ngetattr\n(ctorch\nSize\nV__init__\ntR.", id="an attribute"),
    pytest.param(b"cbuiltins\ngetattr\n(ctorch.storage\nUntypedStorage\nV__class__\ntR.", id="a class"),
]


@pytest.mark.parametrize("content", OPCODES)
def test_pickles_of_no_pickler(content: bytes) -> None:
    with pytest.raises(UserError) as caught:
        unpickle("x", content)
    assert len(str(caught.value).splitlines()) == 1


def test_enums_as_python_wrote_them_before_3_11_4() -> None:
    """As `getattr(the enum, the member's name)`, where later versions call the enum with its value."""
    names: Names = {("a", "Kind"): Enumeration((("one", 1), ("two", 2)))}
    old = lambda name: f"cbuiltins\ngetattr\n(ca\nKind\nV{name}\ntR.".encode()  # noqa: E731
    assert unpickle("x", old("two"), names) == unpickle("x", b"ca\nKind\n(I2\ntR.", names) == 2
    for refused in (old("three"), old("__class__"), b"ca\nKind\n(I3\ntR.", b"ca\nKind\n(V2\ntR."):
        with pytest.raises(UserError, match="not a pickle of a checkpoint"):
            unpickle("x", refused, names)


def drain(path: Path) -> dict[str, bytes]:
    """Read all of a checkpoint, as a conversion does."""
    state = open_state(path)
    try:
        found = {}
        for key, tensor in state.tensors.items():
            with stream([Range.whole(tensor.content)]) as parts:
                found[key] = b"".join(map(bytes, parts))
        return found
    finally:
        state.close()


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_refused_or_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any bytes changed, cut or added anywhere: never other numbers, and never an error other than UserError."""
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    torch.save({"model": {"w": torch.arange(12.0), "h": torch.ones(3, 2).t()}, "step": 4}, folder / "a.pt")
    expected = drain(folder / "a.pt")
    content = bytearray((folder / "a.pt").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (folder / "a.pt").write_bytes(content)
    with suppress(UserError):
        assert drain(folder / "a.pt") == expected
    shutil.rmtree(folder)


def test_a_storage_of_another_size(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(12.0)}, tmp_path / "a.pt")
    replaced(tmp_path / "a.pt", "data/0", bytes(16))
    with pytest.raises(UserError, match="48 are announced"):
        drain(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["pt", "dcp"])
def test_a_flipped_bit_is_found(tmp_path: Path, kind: str) -> None:
    """PyTorch's own readers do not check these checksums."""
    weights = torch.arange(1000.0)
    if kind == "pt":
        path = tmp_path / "a.pt"
        torch.save({"model": {"w": weights}}, path)
    else:
        dcp.save({"model": {"w": weights}}, checkpoint_id=tmp_path / "d", no_dist=True)
        (path,) = (tmp_path / "d").glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 1234] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="their checksum is wrong"):
        drain(path if kind == "pt" else path.parent)
    if kind == "pt":
        assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], weights)
