"""Inputs that fuzzing found, replayed; and small files that would take much time or memory.

`python -m tests.fuzz` looks for more, and so does `tests/fuzz/fuzz.py`, which coverage guides.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from typing import Any

import pytest

from tests.fuzz.drive import drive
from tests.fuzz.kinds import CORPUS, KINDS
from tests.fuzz.targets import header, manifest, sealed
from tests.machine import takes_at_most
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.manifest import decode


def test_the_corpus_is_there() -> None:
    assert {path.name for path in CORPUS.iterdir()} == KINDS.keys()
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < 300_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_finds_nothing(kind: str) -> None:
    seeds = [path.read_bytes() for path in KINDS[kind].corpus]
    found = drive(KINDS[kind], seeds)
    assert [(data[:200], told) for data, told in found.defects] == []
    assert (found.inputs, len(seeds) > 0) == (len(seeds), True)
    assert found.slowest_s < 1


def good() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CORPUS / "manifest/small").read_bytes())
    return content


def with_field(field: str) -> bytes:
    return (CORPUS / "manifest/small").read_bytes()[:-1] + b"," + field.encode() + b"}"


REFUSED = {
    "not a number": '"metric":NaN',
    "infinite": '"saved_s":-Infinity',
    "not a number deep inside": '"loop":{"x":[{"y":NaN}]}',
    "a number that cannot be written": '"position":{"x":' + "9" * 5000 + "}",
    "nested": '"loop":{"x":' + "[" * 100_000 + "]" * 100_000 + "}",
    "half a character": '"loop":{"x":"\\ud800"}',
    "half a character in a name": '"aliases":{"\\ud800":"a"}',
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_not_be_written_again_is_refused(kind: str) -> None:
    decode("m", sealed(with_field('"loop":{"x":[{"y":1.5}]}')))
    with pytest.raises(BadCheckpoint):
        decode("m", sealed(with_field(REFUSED[kind])))


def cut(shape: list[int], pieces: list[dict[str, Any]], numel: int, tensors: int = 1, grain: int = 1) -> bytes:
    """A manifest of byte tensors that share one partition, with all pieces one after the other in one file."""
    fields = good() | {"sources": [], "aliases": {}, "step_counts": {}}
    fields["files"] = [{"path": "model/a.safetensors", "size": 64 + numel * tensors, "data": 64}]
    fields["partitions"] = [{"shape": shape, "pieces": [{"file": 0, **piece} for piece in pieces]}]
    tensor = {"group": "model", "dtype": "I8", "partition": 0, "trained_step": 1}
    starts = [64 + grain * i for i in range(len(pieces))]
    fields["tensors"] = {f"t{i}": {**tensor, "bytes": starts if tensors == 1 else 64} for i in range(tensors)}
    return json.dumps(fields, separators=(",", ":")).encode()


def columns(count: int) -> bytes:
    return cut([2, count], [{"offsets": [0, i], "sizes": [2, 1]} for i in range(count)], 2 * count, grain=2)


def crossed(side: int) -> bytes:
    """Boxes, each of which overlaps half of the others in each dimension."""
    rows = [{"offsets": [i, 0], "sizes": [1, side]} for i in range(side)]
    bars = [{"offsets": [0, side + i], "sizes": [side, 1]} for i in range(side)]
    return cut([side, 2 * side], rows + bars, 2 * side * side, grain=side)


def ranges(count: int, dims: int) -> bytes:
    step = 3**dims // count
    pieces = [{"start": i * step, "length": step} for i in range(count)]
    pieces[-1]["length"] = 3**dims - (count - 1) * step
    return cut([3] * dims, pieces, 3**dims, grain=step)


HEAVY: dict[str, Callable[[], bytes]] = {
    "columns": lambda: columns(10_000),
    "rows and columns": lambda: crossed(5_000),
    "one cut of many tensors": lambda: cut(
        [20_000], [{"start": i, "length": 1} for i in range(20_000)], 20_000, 20_000
    ),
    "nested": lambda: b"[" * (16 << 20),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_small_files_take_neither_long_nor_much_memory(kind: str) -> None:
    body = HEAVY[kind]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    takes_at_most(8.0, lambda: manifest(body))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10, "KiB"


def test_ranges_of_many_dimensions_are_checked_as_ranges() -> None:
    """As boxes they would be 73 times as many, of 37 numbers each."""
    body = ranges(5_000, 37)
    takes_at_most(2.0, lambda: decode("m", sealed(body)))


def test_a_header_of_brackets_is_refused_at_once() -> None:
    body = (16 << 20).to_bytes(8, "little") + b"[" * (16 << 20) + b"\0\0"
    takes_at_most(2.0, lambda: header(body))


def test_a_tensor_cut_into_many_columns_is_accepted() -> None:
    """As with many tensor groups: no two of the boxes overlap in the second dimension."""
    assert len(decode("m", sealed(columns(20_000))).partitions[0].pieces) == 20_000
