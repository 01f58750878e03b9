"""A checkpoint of any layout reads into any other layout, bit for bit."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.format.boxes import GROUPS, Box, boxes_of_range, tiling_fault
from trainer.checkpoint.format.pieces import DTYPES, Piece
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits, with NaNs of all kinds; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """A dimension cut anywhere, into parts that may be empty: (offset, size) of each."""
    marks = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    edges = [0, *marks, size]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Piece]]:
    """A tensor and pieces that make it up: a grid of boxes, or flat ranges; some with replicas, all of which exist."""
    shape, dtype = draw(SHAPES), DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    full = random_tensor(shape, dtype, draw(st.integers(0, 2**31)))
    group = draw(st.sampled_from(GROUPS))
    replicas = draw(st.integers(1, 2))
    pieces = []
    if draw(st.booleans()):
        for start, length in cuts(draw, full.numel()):
            part = full.reshape(-1)[start : start + length]
            pieces += [Piece("t", group, part, shape, (), (), r, replicas, start) for r in range(replicas)]
    else:
        for box in itertools.product(*(cuts(draw, size) for size in shape)):
            offsets, sizes = tuple(o for o, _ in box), tuple(n for _, n in box)
            part = full[tuple(slice(o, o + n) for o, n in box)]
            pieces += [Piece("t", group, part, shape, offsets, sizes, r, replicas) for r in range(replicas)]
    return full, pieces


@given(cut_tensors(), st.data())
@settings(max_examples=150)
def test_any_cut_reads_back_as_any_box_or_range(written: tuple[torch.Tensor, list[Piece]], data: st.DataObject) -> None:
    full, pieces = written
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", asynchronous=False)
        store.save(1, pieces, RunState())
        assert [result.error for result in store.poll()] == [None]
        checkpoint = Checkpoint(store.shelf.path(1))
        checkpoint.verify()
        assert same_bits(checkpoint.read("t"), full)
        for _ in range(4):
            box = [data.draw(st.integers(0, size)) for size in full.shape]
            ends = [data.draw(st.integers(low, size)) for low, size in zip(box, full.shape, strict=True)]
            sizes = [end - low for low, end in zip(box, ends, strict=True)]
            out = torch.empty(sizes, dtype=full.dtype)
            checkpoint.read_into("t", box, sizes, out)
            assert same_bits(out, full[tuple(slice(low, end) for low, end in zip(box, ends, strict=True))])
        start = data.draw(st.integers(0, full.numel()))
        out = torch.empty(data.draw(st.integers(0, full.numel() - start)), dtype=full.dtype)
        checkpoint.read_range_into("t", start, out)
        assert same_bits(out, full.reshape(-1)[start : start + out.numel()])


@pytest.mark.parametrize("rows", [1, 700, 3000])
def test_reading_across_blocks(tmp_path: Path, rows: int) -> None:
    """Tensors of several 4 MiB blocks: columns, odd ranges and whole rows. Only touched blocks are read."""
    full = torch.randn(3000, 1111)
    small = torch.arange(5, dtype=torch.int16)
    pieces = [Piece("a", "model", full[:rows], (3000, 1111), (0, 0), (rows, 1111))]
    pieces.append(Piece("a", "model", full.view(-1)[rows * 1111 :], (3000, 1111), (), (), start=rows * 1111))
    if rows == 3000:
        pieces = [Piece("a", "model", full[:, c : c + 505], (3000, 1111), (0, c), (3000, 505)) for c in (0, 505)]
        pieces.append(Piece("a", "model", full[:, 1010:], (3000, 1111), (0, 1010), (3000, 101)))
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, [*pieces, Piece("s", "model", small, (5,), (0,), (5,))], RunState())
    assert [result.error for result in store.wait()] == [None]
    checkpoint = Checkpoint(store.shelf.path(1))
    for offsets, sizes in [
        ((0, 0), (3000, 1111)),
        ((1, 1), (2998, 1)),
        ((699, 3), (1400, 1108)),
        ((2999, 1110), (1, 1)),
    ]:
        out = torch.empty(sizes)
        checkpoint.read_into("a", offsets, sizes, out)
        (r, c), (m, n) = offsets, sizes
        assert torch.equal(out, full[r : r + m, c : c + n])
    assert torch.equal(checkpoint.read("s"), small)


@given(SHAPES, st.data())
@settings(max_examples=200)
def test_a_range_is_few_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - start))
    full = torch.arange(total).reshape(shape)
    boxes = boxes_of_range(shape, start, length)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    found = torch.full((length,), -1)
    for box in boxes:
        part = full[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))].reshape(-1)
        found[box.start : box.start + box.numel] = part
    assert torch.equal(found, torch.arange(start, start + length))


@given(st.data())
@settings(max_examples=200)
def test_tiling_faults_are_found(data: st.DataObject) -> None:
    """Compared with counting elements one by one."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    boxes = []
    for _ in range(data.draw(st.integers(0, 4))):
        low = [data.draw(st.integers(0, size - 1)) for size in shape]
        sizes = [data.draw(st.integers(1, size - o)) for o, size in zip(low, shape, strict=True)]
        boxes.append(Box(tuple(low), tuple(sizes)))
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        counts[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
    assert (tiling_fault(shape, boxes) is None) == bool((counts == 1).all())


def test_wrong_reads_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", asynchronous=False)
    store.save(1, [Piece("a", "model", torch.ones(4), (4,), (0,), (4,))], RunState(aliases={"tied": "a"}))
    checkpoint = Checkpoint(store.shelf.path(1))
    with pytest.raises(KeyError, match="no tensor 'b'"):
        checkpoint.read_into("b", (0,), (4,), torch.empty(4))
    with pytest.raises(ValueError, match="not inside"):
        checkpoint.read_into("a", (1,), (4,), torch.empty(4))
    with pytest.raises(ValueError, match="3 elements to fill"):
        checkpoint.read_into("a", (0,), (4,), torch.empty(3))
    with pytest.raises(ValueError, match=r"stored as torch\.float32"):
        checkpoint.read_into("a", (0,), (4,), torch.empty(4, dtype=torch.bfloat16))
    out = torch.empty(4, dtype=torch.bfloat16)
    checkpoint.read_into("tied", (0,), (4,), out, cast=True)
    assert torch.equal(out, torch.ones(4, dtype=torch.bfloat16))
