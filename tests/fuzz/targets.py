"""Texts of a checkpoint. Each must be refused as BadCheckpoint, or hold together. Anything else is a defect.

A body gets its right digest first, so that the fuzzer reaches the code behind the checksums.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.files import BLOCK_BYTES, HEADER_LIMIT_BYTES, blocks_in, parse_header
from trainer.checkpoint.format.manifest import Manifest, decode, decode_checksums, digest
from trainer.progress import Progress

SAVED = Path(__file__).with_name("saved_by_a_run.json").read_bytes()  # by two ranks, partly frozen; without its digest
_EMPTY = Manifest(step=0, files=[], partitions=[], tensors={}, checksums="0" * 32)


def sealed(body: bytes) -> bytes:
    """A JSON object's text with the digest that manifest.json needs."""
    text = body.rstrip().removesuffix(b"}")
    return text + b',"digest":"' + digest(text + b',"digest":""}\n').encode() + b'"}\n'


def manifest(body: bytes) -> None:
    """The text of a manifest, without its digest."""
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


def manifest_signed(body: bytes) -> None:
    """{"at": [key or index, ...], "value": anything}: change one place of a real manifest, and sign it again. It must
    be refused, or mean what it says: the trainer goes on from its step and position."""
    changes, tree = apply(json.loads(SAVED), body)
    if not changes:
        return
    text = json.dumps(tree, separators=(",", ":")).encode()
    try:
        found = decode("m", sealed(text))
    except BadCheckpoint:
        return
    read = found.model_dump(mode="json")
    goes_on_as_it_says(read, Progress.of(found))
    assert seems_same(read, json.loads(text)), changes
    for key in found.tensors:
        assert sum(place.box.numel for place in found.places(key)) == math.prod(found.shape_of(key)), key


def apply(tree: Any, body: bytes) -> tuple[list[Any], Any]:
    """(the changes that could be made to a tree, the tree). `body`: one change, or a list of them."""
    changes = []
    try:
        told = json.loads(body)
        json.dumps(told).encode()
    except (ValueError, RecursionError):
        return [], tree
    for change in told if isinstance(told, list) else [told]:
        try:
            *outer, last = change["at"]
            node = tree
            for key in outer:
                node = node[key]
            node[last] = change["value"]
            changes.append(change)
        except (LookupError, TypeError, ValueError):
            continue
    return changes, tree


def goes_on_as_it_says(read: dict[str, Any], progress: Progress) -> None:
    """Check that a manifest says the same where it says a value twice, and that the trainer goes on from there."""
    step, samples, loop = read["step"], read["position"].get("consumed_samples"), read["loop"]
    assert loop.get("step", step) == step == progress.step
    assert loop.get("consumed_samples", samples) == samples
    assert progress.consumed_samples == (samples or 0)
    assert read["metric"] is None or loop.get("best_loss", read["metric"]) == read["metric"]


def seems_same(one: Any, other: Any) -> bool:
    """Equal in value and kind. A whole number equals the same float, and `one` may have more keys."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() >= other.keys() and all(seems_same(one[key], value) for key, value in other.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(seems_same, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def checksums(body: bytes) -> None:
    """The text of checksums.json, for a manifest with the digest of this text."""
    known = _EMPTY.model_copy(update={"checksums": digest(body)})
    try:
        hashes = decode_checksums("c", body, known, BLOCK_BYTES)
    except BadCheckpoint:
        return
    assert hashes == {}


def header(text: bytes) -> None:
    """A safetensors file. Its first 8 bytes are the header's length, and the last two change the file's size."""
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
