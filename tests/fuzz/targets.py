"""What the fuzzers call: bytes in, and either BadCheckpoint, or something that holds together. All else is a defect.

A body is given its right digest first: what is looked for lies behind the checksums.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.checkpoint.errors import BadCheckpoint
from trainer.checkpoint.files import BLOCK_BYTES, HEADER_LIMIT_BYTES, blocks_in, parse_header
from trainer.checkpoint.manifest import Manifest, decode, decode_checksums, digest

_EMPTY = Manifest(step=0, files=[], partitions=[], tensors={}, checksums="0" * 32)


def sealed(body: bytes) -> bytes:
    """A JSON object's text with the digest that manifest.json needs."""
    text = body.rstrip().removesuffix(b"}")
    return text + b',"digest":"' + digest(text + b',"digest":""}\n').encode() + b'"}\n'


def manifest(body: bytes) -> None:
    """The text of a manifest, its digest left out."""
    try:
        found = decode("m", sealed(body))
    except BadCheckpoint:
        return
    for key in found.tensors:
        boxes = sum(place.box.numel for place in found.places(key))
        assert boxes == math.prod(found.shape_of(key)), key
        for file, start, end in found.ranges(key):
            assert 0 <= start < end <= found.files[file].size, key
    for file in found.files:
        assert ".." not in file.path.split("/")
    assert decode("m", found.encode()) == found


def checksums(body: bytes) -> None:
    """The text of checksums.json, for a manifest that means just this text."""
    known = _EMPTY.model_copy(update={"checksums": digest(body)})
    try:
        hashes = decode_checksums("c", body, known, BLOCK_BYTES)
    except BadCheckpoint:
        return
    assert hashes == {}


def header(text: bytes) -> None:
    """A safetensors file: its first 8 bytes are the header's length, less what the last two say of the file's size."""
    raw, room = text[:-2], int.from_bytes(text[-2:], "little")
    size = len(raw) + room
    try:
        entries = parse_header("f", raw, size)
    except BadCheckpoint:
        return
    assert int.from_bytes(raw[:8], "little") <= HEADER_LIMIT_BYTES
    end = max((entry.end for entry in entries.values()), default=8 + int.from_bytes(raw[:8], "little"))
    assert end == size
    assert blocks_in(size) >= 1


TARGETS: dict[str, Callable[[bytes], None]] = {"manifest": manifest, "checksums": checksums, "header": header}
