"""Reading many boxes at once is right, reads each touched block once and no other, and names a bad block."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from trainer.checkpoint.format import files
from trainer.checkpoint.format.boxes import WIDTHS, Wanted
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.files import BLOCK_BYTES
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load import read as reading
from trainer.checkpoint.load.checkpoint import Checkpoint, file_path
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

SMALL = [f"small.{i}" for i in range(60)]
WIDE = 3 * BLOCK_BYTES // 4  # elements of a row that is three blocks long


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Tensors of 45 MB by three ranks: rows, columns, ranges, many small ones, and rows longer than a block."""
    torch.manual_seed(1)
    full = {
        "rows": torch.randn(1500, 1000),
        "columns": torch.randn(700, 1500),
        "ranges": torch.randn(1000, 1001).bfloat16(),
        "deep": torch.randn(20, 30, 40, 50),
        "wide": torch.randn(2, WIDE),
        **{name: torch.randn(random.Random(name).randint(1, 40_000)) for name in SMALL},
    }
    store = CheckpointStore(tmp_path_factory.mktemp("saved") / "checkpoints", asynchronous=False)
    pieces = []
    for a, b in pairwise((0, 400, 900, 1500)):
        pieces.append(Piece("rows", "model", full["rows"][a:b], (1500, 1000), (a, 0), (b - a, 1000)))
        pieces.append(Piece("columns", "optim", full["columns"][:, a:b], (700, 1500), (0, a), (700, b - a)))
    flat = full["ranges"].view(-1)
    for a, b in pairwise((0, 333_333, 333_334, 1_001_000)):
        pieces.append(Piece("ranges", "frozen", flat[a:b], (1000, 1001), (), (), start=a))
    for name in ("deep", "wide", *SMALL):
        tensor = full[name]
        pieces.append(Piece(name, "model", tensor, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape)))
    store.save(1, pieces, RunState())
    assert [result.error for result in store.poll()] == [None]
    return store.shelf.path(1), full


@pytest.fixture
def read_ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(inode, first byte, end) of every read."""
    found: list[tuple[int, int, int]] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = preadv(fd, buffers, offset)
        found.append((os.fstat(fd).st_ino, offset, offset + got))
        return got

    monkeypatch.setattr(files.os, "preadv", counted)
    return found


def random_boxes(full: dict[str, torch.Tensor], rng: random.Random) -> list[tuple[str, tuple[slice, ...]]]:
    boxes = []
    for key, tensor in full.items():
        for _ in range(1 if key in SMALL else 3):
            marks = [sorted(rng.sample(range(size + 1), 2)) for size in tensor.shape]
            boxes.append((key, tuple(slice(a, b) for a, b in marks)))
    rng.shuffle(boxes)
    return boxes


def wanted(key: str, box: tuple[slice, ...], out: torch.Tensor, cast: bool = False) -> Wanted:
    return Wanted(key, out, tuple(s.start for s in box), tuple(s.stop - s.start for s in box), cast)


@pytest.mark.parametrize("threads", [1, 4])
def test_many_boxes_at_once(
    saved: tuple[Path, dict[str, torch.Tensor]],
    read_ranges: list[tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    """Read into tensors of all kinds: contiguous, transposed, with gaps, of another dtype; boxes may overlap. Each
    touched block is read exactly once, and no other."""
    path, full = saved
    monkeypatch.setattr(reading, "READING_THREADS", threads)
    checkpoint = Checkpoint(path)
    for seed in range(2):
        rng = random.Random(seed)
        boxes = random_boxes(full, rng)
        outs, expected = [], []
        for key, box in boxes:
            part = full[key][box]
            kind = rng.choice(("plain", "turned", "gaps", "cast"))
            if kind == "turned":
                out = torch.empty(part.shape[::-1], dtype=part.dtype).permute(*reversed(range(part.ndim)))
            elif kind == "gaps":
                out = torch.empty(*part.shape, 2, dtype=part.dtype)[..., 0]
            else:
                out = torch.empty(part.shape, dtype=torch.float64 if kind == "cast" else part.dtype)
            outs.append(wanted(key, box, out, cast=kind == "cast"))
            expected.append(part)
        read_ranges.clear()
        checkpoint.read_all(outs)
        for one, part in zip(outs, expected, strict=True):
            assert torch.equal(one.out, part.to(one.out.dtype)), one.key
        assert blocks_read(read_ranges) == blocks_touched(checkpoint, outs)
        checkpoint.close()


def blocks_read(ranges: list[tuple[int, int, int]]) -> Counter[tuple[int, int]]:
    """How many bytes of each block of each file were read."""
    found: Counter[tuple[int, int]] = Counter()
    for inode, start, end in ranges:
        assert start // BLOCK_BYTES == (end - 1) // BLOCK_BYTES
        found[inode, start // BLOCK_BYTES] += end - start
    return found


def blocks_touched(checkpoint: Checkpoint, boxes: list[Wanted]) -> Counter[tuple[int, int]]:
    """Each block that holds an element of one of the boxes, and its size. Found by looking at every element."""
    found: Counter[tuple[int, int]] = Counter()
    for one in boxes:
        width = WIDTHS[checkpoint.manifest.dtype_of(one.key)]
        inside = tuple(slice(o, o + n) for o, n in zip(one.offsets, one.sizes, strict=True))
        marked = torch.zeros(checkpoint.manifest.shape_of(one.key), dtype=torch.bool)
        marked[inside] = True
        for place in checkpoint.manifest.places(one.key):
            cut = tuple(slice(o, o + n) for o, n in zip(place.box.offsets, place.box.sizes, strict=True))
            elements = marked[cut].reshape(-1).nonzero().view(-1)
            file = checkpoint.manifest.files[place.file]
            inode = file_path(checkpoint.path, checkpoint.manifest, file).stat().st_ino
            for block in ((place.byte + elements * width) // BLOCK_BYTES).unique().tolist():
                found[inode, block] = min(BLOCK_BYTES, file.size - block * BLOCK_BYTES)
    return found


def test_columns_of_rows_wider_than_a_block(
    saved: tuple[Path, dict[str, torch.Tensor]], read_ranges: list[tuple[int, int, int]]
) -> None:
    path, full = saved
    checkpoint = Checkpoint(path)
    box = (slice(0, 2), slice(WIDE - 5, WIDE))
    out = torch.empty(2, 5)
    checkpoint.read_all([wanted("wide", box, out)])
    assert torch.equal(out, full["wide"][box])
    assert sum(end - start for _, start, end in read_ranges) <= 4 * BLOCK_BYTES


@pytest.mark.parametrize("threads", [1, 4])
def test_a_bad_block_is_named_when_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(reading, "READING_THREADS", threads)
    monkeypatch.setattr(reading, "TASK_BLOCKS", 2)
    tensor = torch.arange(8 * BLOCK_BYTES // 4, dtype=torch.int32)
    store = CheckpointStore(tmp_path / "checkpoints", asynchronous=False)
    store.save(1, [Piece("a", "model", tensor, tuple(tensor.shape), (0,), tuple(tensor.shape))], RunState())
    path = store.shelf.path(1) / "model/rank-00000.safetensors"
    with path.open("r+b") as file:
        file.seek(5 * BLOCK_BYTES + 17)
        byte = file.read(1)
        file.seek(5 * BLOCK_BYTES + 17)
        file.write(bytes([byte[0] ^ 1]))
    checkpoint = Checkpoint(store.shelf.path(1))
    half = torch.empty(4 * BLOCK_BYTES // 4, dtype=torch.int32)
    checkpoint.read_all([Wanted("a", half, (0,), tuple(half.shape))])
    assert torch.equal(half, tensor[: len(half)])
    for read in (lambda: checkpoint.read("a"), lambda: checkpoint.verify(threads=threads)):
        with pytest.raises(BadCheckpoint) as caught:
            read()
        assert caught.value.path == path
        assert caught.value.bytes_range == (5 * BLOCK_BYTES, 6 * BLOCK_BYTES)


def test_verify_tells_how_far_it_is(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    checkpoint = Checkpoint(saved[0])
    told: list[int] = []
    callers: set[int] = set()

    def progress(good: int) -> None:
        told.append(good)
        callers.add(threading.get_ident())

    checkpoint.verify(progress, threads=3)
    assert sum(told) == checkpoint.manifest.size_bytes
    assert callers == {threading.get_ident()}
