"""A damaged checkpoint is named and refused, never loaded. The run falls back to the checkpoint before."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.files import BLOCK_BYTES, parse_header
from trainer.checkpoint.format.manifest import Manifest, decode, decode_checksums, digest
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

MODEL, OPTIM = "model/rank-00000.safetensors", "optim/rank-00000.safetensors"


def whole(key: str, group: Group, tensor: torch.Tensor) -> Piece:
    return Piece(key, group, tensor, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape))


def save(root: Path, step: int) -> CheckpointStore:
    store = CheckpointStore(root, asynchronous=False, keep=KeepSection(last=5))
    size = BLOCK_BYTES // 4 + 1000
    pieces = [
        whole("a", "model", torch.full((40,), float(step))),
        whole("a.m", "optim", torch.full((size,), step / 7)),
    ]
    store.save(step, pieces, RunState(position={"consumed_samples": step}, step_counts={"a": step}))
    assert [result.error for result in store.poll()] == [None]
    return store


def in_order(*actions: Callable[[], object]) -> None:
    for action in actions:
        action()


def flip(path: Path, byte: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data truncated": (MODEL, lambda f: truncate(f / MODEL, -1)),
    "data emptied": (MODEL, lambda f: truncate(f / MODEL, 0)),
    "data missing": (OPTIM, lambda f: (f / OPTIM).unlink()),
    "data a symlink": (
        MODEL,
        lambda f: in_order(lambda: (f / MODEL).rename(f / "x"), lambda: (f / MODEL).symlink_to(f / "x")),
    ),
    "manifest bit": ("manifest.json", lambda f: flip(f / "manifest.json", 40)),
    "manifest digest bit": ("manifest.json", lambda f: flip(f / "manifest.json", -5, 0)),
    "manifest truncated": ("manifest.json", lambda f: truncate(f / "manifest.json", -20)),
    "manifest empty": ("manifest.json", lambda f: truncate(f / "manifest.json", 0)),
    "manifest missing": ("manifest.json", lambda f: (f / "manifest.json").unlink()),
    "manifest a folder": (
        "manifest.json",
        lambda f: in_order((f / "manifest.json").unlink, (f / "manifest.json").mkdir),
    ),
    "checksums bit": ("checksums.json", lambda f: flip(f / "checksums.json", 60)),
    "checksums missing": ("checksums.json", lambda f: (f / "checksums.json").unlink()),
    "checksums of another": (
        "checksums.json",
        lambda f: shutil.copy(f.parent / "step-00000001" / "checksums.json", f / "checksums.json"),
    ),
    "manifest of another": (
        "step-00000002",
        lambda f: [shutil.copy(f.parent / "step-00000001" / n, f / n) for n in ("manifest.json", "checksums.json")],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_seen_at_opening_falls_back(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "checkpoints", 1)
    shelf = save(tmp_path / "checkpoints", 2).shelf
    said: list[str] = []
    shelf._say = said.append
    named, damage = DAMAGE[kind]
    damage(shelf.path(2))
    found = shelf.newest_good()
    assert found is not None
    assert found.step == 1
    found.verify()
    assert shelf.steps() == [1]
    assert len(said) == 1
    assert named in said[0]
    assert "step-00000002.bad-0" in said[0]
    save(tmp_path / "checkpoints", 2)
    flip(shelf.path(2) / "manifest.json", 40)
    assert shelf.newest_good() is not None
    assert (shelf.root / "step-00000002.bad-1").is_dir()


def block_damage(folder: Path) -> list[tuple[str, str, Callable[[], object]]]:
    """Damage that only reading blocks can see: (file, a tensor in it, the action)."""
    other = folder.parent / "step-00000001"
    return [
        (MODEL, "a", lambda: flip(folder / MODEL, -1, 0)),
        (MODEL, "a", lambda: flip(folder / MODEL, 0, 0)),  # the header's length
        (MODEL, "a", lambda: flip(folder / MODEL, 30)),  # the header's text
        (OPTIM, "a.m", lambda: flip(folder / OPTIM, BLOCK_BYTES - 1)),
        (OPTIM, "a.m", lambda: flip(folder / OPTIM, BLOCK_BYTES)),
        (MODEL, "a", lambda: shutil.copy(other / MODEL, folder / MODEL)),  # swapped with that of another step
        (OPTIM, "a.m", lambda: (folder / OPTIM).write_bytes(bytes((folder / OPTIM).stat().st_size))),  # zero-filled
    ]


@pytest.mark.parametrize("case", range(7))
def test_damage_inside_blocks_is_named_when_read(tmp_path: Path, case: int) -> None:
    save(tmp_path / "checkpoints", 1)
    shelf = save(tmp_path / "checkpoints", 2).shelf
    file, tensor, damage = block_damage(shelf.path(2))[case]
    damage()
    checkpoint = Checkpoint(shelf.path(2))
    for attempt in (lambda: checkpoint.read(tensor), checkpoint.verify, Checkpoint(shelf.path(2)).verify):
        with pytest.raises(BadCheckpoint) as caught:
            attempt()
        assert caught.value.path == shelf.path(2) / file
        assert caught.value.bytes_range is not None
        assert "checksum" in caught.value.reason
    untouched = "a.m" if tensor == "a" else "a"
    checkpoint.read(untouched)


def test_only_touched_blocks_are_read(tmp_path: Path) -> None:
    shelf = save(tmp_path / "checkpoints", 1).shelf
    flip(shelf.path(1) / OPTIM, BLOCK_BYTES + 5)
    checkpoint = Checkpoint(shelf.path(1))
    out = torch.empty(1000)
    checkpoint.read_into("a.m", (5,), (1000,), out)
    assert torch.equal(out, torch.full((1000,), 1 / 7))
    with pytest.raises(BadCheckpoint, match=f"bytes {BLOCK_BYTES} to"):
        checkpoint.read_into("a.m", (BLOCK_BYTES // 4,), (5,), out[:5])


def test_all_bad_is_an_error_and_nothing_is_renamed(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    shelf = save(tmp_path / "checkpoints", 2).shelf
    for step in (1, 2):
        (shelf.path(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        shelf.newest_good()
    assert shelf.steps() == [1, 2]
    for step in (1, 2):
        shelf.reject(step, "a block was bad")
    with pytest.raises(UserError, match=r"only step-00000001\.bad-0, step-00000002\.bad-0"):
        shelf.newest_good()


def test_a_file_that_changes_under_the_reader_is_bad(tmp_path: Path) -> None:
    shelf = save(tmp_path / "checkpoints", 1).shelf
    checkpoint = Checkpoint(shelf.path(1))
    truncate(shelf.path(1) / OPTIM, BLOCK_BYTES + 10)
    with pytest.raises(BadCheckpoint, match="ends too early"):
        checkpoint.read("a.m")
    (shelf.path(1) / MODEL).unlink()
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        checkpoint.read("a")


def resigned(change: Callable[[dict[str, object]], object], path: Path) -> bytes:
    """A manifest with a change and a right digest, so that only the strict checks can find the change."""
    fields = json.loads(path.read_bytes())
    change(fields)
    return signed(fields)


def signed(fields: dict[str, object]) -> bytes:
    """The text of a manifest with a right digest."""
    fields.pop("digest", None)
    text = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    return text + b',"digest":"' + digest(text + b',"digest":""}\n').encode() + b'"}\n'


LIES: dict[str, Callable[[dict[str, object]], object]] = {
    "another format": lambda m: m.update(format=2),
    "unknown field": lambda m: m.update(extra=1),
    "step as text": lambda m: m.update(step="1"),
    "negative step": lambda m: m.update(step=-1),
    "path leaves": lambda m: m["files"][0].update(path="model/../../x.safetensors"),  # type: ignore[index]
    "absolute path": lambda m: m["files"][0].update(path="/etc/x.safetensors"),  # type: ignore[index]
    "file twice": lambda m: m["files"].append(m["files"][0]),  # type: ignore[attr-defined,index]
    "gap": lambda m: m["partitions"][0]["pieces"][0].update(sizes=[39]),  # type: ignore[index]
    "beyond": lambda m: m["partitions"][0]["pieces"][0].update(offsets=[1]),  # type: ignore[index]
    "wrong rank": lambda m: m["partitions"][0]["pieces"][0].update(offsets=[0, 0]),  # type: ignore[index]
    "overlap": lambda m: m["partitions"][0]["pieces"].append(m["partitions"][0]["pieces"][0]),  # type: ignore[index]
    "huge shape": lambda m: m["partitions"][0].update(shape=[1 << 61, 1 << 61]),  # type: ignore[index]
    "huge range": lambda m: m["partitions"][0].update(pieces=[{"file": 0, "start": 0, "length": 1 << 61}]),  # type: ignore[index]
    "no such file": lambda m: m["partitions"][0]["pieces"][0].update(file=9),  # type: ignore[index]
    "no such partition": lambda m: m["tensors"]["a"].update(partition=9),  # type: ignore[index]
    "another place": lambda m: m["tensors"]["a"].update(bytes=0),  # type: ignore[index]
    "wrong number of places": lambda m: m["tensors"]["a"].update(bytes=[64, 64]),  # type: ignore[index]
    "wider dtype": lambda m: m["tensors"]["a"].update(dtype="F64"),  # type: ignore[index]
    "unknown dtype": lambda m: m["tensors"]["a"].update(dtype="F31"),  # type: ignore[index]
    "another group": lambda m: m["tensors"]["a"].update(group="optim"),  # type: ignore[index]
    "tensor left out": lambda m: m["tensors"].pop("a"),  # type: ignore[attr-defined]
    "alias of nothing": lambda m: m.update(aliases={"x": "y"}),
    "steps of nothing": lambda m: m.update(step_counts={"y": 1}),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("sound") / "checkpoints", 1).shelf.path(1)


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(sound: Path, lie: str) -> None:
    path = sound / "manifest.json"
    assert decode(path, resigned(lambda m: None, path)).step == 1
    with pytest.raises(BadCheckpoint, match=r"manifest\.json"):
        decode(path, resigned(LIES[lie], path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.data())
@settings(max_examples=300)
def test_fuzzed_manifests(sound: Path, data: st.DataObject) -> None:
    """Any value in it replaced by anything gives BadCheckpoint, or a manifest that holds together."""
    fields = json.loads((sound / "manifest.json").read_bytes())
    node: object = fields
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if data.draw(st.booleans()) or not isinstance(node[key], dict | list):
            node[key] = data.draw(JSON)
            break
        node = node[key]
    try:
        manifest = decode("m", signed(fields))
    except BadCheckpoint:
        return
    for key in manifest.tensors:
        assert sum(place.box.numel for place in manifest.places(key)) == math.prod(manifest.shape_of(key))


@given(st.binary(max_size=300) | st.integers(0, 10**5).map(lambda n: b"[" * n))
@settings(max_examples=200)
def test_fuzzed_bytes_of_small_files(sound: Path, content: bytes) -> None:
    with_digest = content + b',"digest":"' + digest(content + b',"digest":""}\n').encode() + b'"}\n'
    manifest = Checkpoint(sound).manifest
    for attempt in (
        lambda: decode("m", content),
        lambda: decode("m", with_digest),
        lambda: decode_checksums("c", content, manifest, BLOCK_BYTES),
        lambda: decode_checksums("c", content, manifest.model_copy(update={"checksums": digest(content)}), BLOCK_BYTES),
    ):
        with pytest.raises(BadCheckpoint):
            attempt()


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


ENTRY = {"dtype": st.sampled_from(["F32", "I8", "X", 3]), "shape": JSON, "data_offsets": JSON | st.just([0, 8])}


@given(
    st.binary(max_size=200)
    | st.binary(max_size=100).map(header)
    | JSON.map(lambda value: header(json.dumps(value).encode()))
    | st.dictionaries(st.text(max_size=3), st.fixed_dictionaries(ENTRY), max_size=3).map(
        lambda value: header(json.dumps(value).encode())
    ),
    st.integers(0, 400),
)
@example(header(b"{}", 1 << 63), 10)
@example(header(b"[" * 100_000), 100_008)
@example(header(b'{"a":{"dtype":"I8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'), 6000)
@settings(max_examples=400)
def test_fuzzed_headers(raw: bytes, size: int) -> None:
    """Gives BadCheckpoint, or entries that fill the file exactly."""
    try:
        entries = parse_header("f", raw, size)
    except BadCheckpoint:
        return
    end = max((entry.end for entry in entries.values()), default=8 + int.from_bytes(raw[:8], "little"))
    assert end == size


def test_manifest_round_trip(sound: Path) -> None:
    content = (sound / "manifest.json").read_bytes()
    manifest: Manifest = decode("m", content)
    assert manifest.encode() == content
