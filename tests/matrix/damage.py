"""Checkpoints with a wrong content and right sizes, checksums and digests.

Only a comparison with what was written can find such damage. The format is written out here once more, so that a
mistake in the code under test is not repeated.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 4 << 20
Header = dict[str, Any]


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """A copy that may be changed, alone in its folder."""
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


def flip(checkpoint: Path, key: str) -> None:
    """Flip one bit of the first element of a stored tensor, the lowest of its mantissa."""

    def change(header: Header, data: bytearray) -> None:
        label = next(label for label in header if label.rpartition("@")[0] == key)
        data[header[label]["data_offsets"][0]] ^= 1

    _change_file(checkpoint, _file_with(checkpoint, key), change)
    _seal(checkpoint, lambda manifest: None)


def drop(checkpoint: Path, keys: list[str], parameter: str | None = None) -> None:
    """Remove tensors from files and manifest. The manifest then says that `parameter`, if given, was never updated."""

    def forget(manifest: dict[str, Any]) -> None:
        for key in keys:
            del manifest["tensors"][key]
        if parameter is not None:
            del manifest["step_counts"][parameter]
            manifest["stateless"] = sorted([*manifest.get("stateless", []), parameter])

    for path in sorted(checkpoint.glob("*/*.safetensors")):
        header, _ = _read(path)
        if any(label.rpartition("@")[0] in keys for label in header):
            _change_file(checkpoint, path, lambda header, data: _cut(header, data, keys))
    _seal(checkpoint, forget)


def shift(checkpoint: Path, samples: int) -> None:
    """Make the checkpoint go on at another sample."""

    def move(manifest: dict[str, Any]) -> None:
        manifest["position"]["consumed_samples"] += samples
        manifest["loop"]["consumed_samples"] += samples

    _seal(checkpoint, move)


def _cut(header: Header, data: bytearray, keys: list[str]) -> None:
    kept = [(label, entry) for label, entry in header.items() if label.rpartition("@")[0] not in keys]
    content = bytearray()
    header.clear()
    for label, entry in kept:
        begin, end = entry.get("data_offsets", (0, 0))
        if "data_offsets" in entry:
            entry = {**entry, "data_offsets": [len(content), len(content) + end - begin]}
            content += data[begin:end]
        header[label] = entry
    data[:] = content


def _file_with(checkpoint: Path, key: str) -> Path:
    for path in sorted(checkpoint.glob("*/*.safetensors")):
        if any(label.rpartition("@")[0] == key for label in _read(path)[0]):
            return path
    raise AssertionError(f"{key} is in no file of {checkpoint}")


def _read(path: Path) -> tuple[Header, bytearray]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def _change_file(checkpoint: Path, path: Path, change: Callable[[Header, bytearray], None]) -> None:
    header, data = _read(path)
    change(header, data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path.unlink()  # the file may be a hard link of another checkpoint's
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _seal(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and make sizes, places, checksums and digests fit the files."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["digest"]
    change(manifest)
    hashes, places = {}, {}
    for index, file in enumerate(manifest["files"]):
        content = (checkpoint / file["path"]).read_bytes()
        header, data = _read(checkpoint / file["path"])
        file["size"], file["data"] = len(content), len(content) - len(data)
        blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
        hashes[file["path"]] = "".join(xxhash.xxh3_64_hexdigest(block) for block in blocks)
        for label, entry in header.items():
            if label != "__metadata__":
                places[index, label] = file["data"] + entry["data_offsets"][0]
    for key, tensor in manifest["tensors"].items():
        pieces = manifest["partitions"][tensor["partition"]]["pieces"]
        tensor["bytes"] = [places[piece["file"], _label(key, piece)] for piece in pieces]
    sums = json.dumps({"block_bytes": BLOCK_BYTES, "xxh3_64": hashes}).encode()
    manifest["checksums"] = xxhash.xxh3_128_hexdigest(sums)
    (checkpoint / "checksums.json").write_bytes(sums)
    body = json.dumps(manifest, separators=(",", ":"))[:-1]
    digest = xxhash.xxh3_128_hexdigest((body + ',"digest":""}\n').encode())
    (checkpoint / "manifest.json").write_text(body + f',"digest":"{digest}"}}\n')


def _label(key: str, piece: dict[str, Any]) -> str:
    return f"{key}@{','.join(map(str, piece['offsets']))}" if "offsets" in piece else f"{key}@+{piece['start']}"
