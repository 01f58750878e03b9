"""Where the parts of a tensor are: boxes and flat ranges, and whether together they make the tensor whole. No torch.

A flat range is equal to a few boxes (`boxes_of_range`), so all code that reads uses boxes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Group = Literal["model", "frozen", "optim"]
GROUPS: tuple[Group, ...] = ("model", "frozen", "optim")

# Bytes per number of each format, by its name in safetensors.
WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}

Ints = tuple[int, ...]
COMPARISONS_LIMIT = 200_000_000  # of numbers, when pieces are checked for overlaps: about a second


@dataclass(frozen=True)
class Box:
    """A box of a tensor. Its row-major content begins `start` elements into the stored piece."""

    offsets: Ints
    sizes: Ints
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Wanted:
    """A box of tensor `key`, and the tensor that receives it: prod(sizes) elements, on any device. A dtype other than
    the stored one is refused unless `cast`."""

    key: str
    out: torch.Tensor
    offsets: Ints
    sizes: Ints
    cast: bool = False


def box_label(key: str, offsets: Sequence[int]) -> str:
    """A box's name in a file: `name@128,0`; `name@` for a 0-d tensor."""
    return f"{key}@{','.join(map(str, offsets))}"


def range_label(key: str, start: int) -> str:
    """A flat range's name in a file: `name@+128`."""
    return f"{key}@+{start}"


def boxes_of_range(shape: Ints, start: int, length: int) -> list[Box]:
    """The flat range [start, start + length) of a tensor's row-major order, as at most 2 x dims - 1 boxes, in order."""
    if length == 0:
        return []
    if not shape:
        return [Box((), ())]
    row, end = math.prod(shape[1:]), start + length
    first, last = -(-start // row), end // row  # the whole rows

    def within(index: int, low: int, high: int) -> list[Box]:
        inner = boxes_of_range(shape[1:], low - index * row, high - low)
        return [Box((index, *b.offsets), (1, *b.sizes), b.start + low - start) for b in inner]

    if first > last:
        return within(last, start, end)
    boxes = within(first - 1, start, first * row)
    if last > first:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(Box((first, *zeros), (last - first, *shape[1:]), first * row - start))
    return boxes + within(last, last * row, end)


def intersect(a: Box, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[Ints, Ints] | None:
    """(offsets, sizes) of the part that a box shares with another; None without such a part."""
    low = tuple(max(x, y) for x, y in zip(a.offsets, offsets, strict=True))
    high = tuple(min(x + n, y + m) for x, n, y, m in zip(a.offsets, a.sizes, offsets, sizes, strict=True))
    if any(end <= begin for begin, end in zip(low, high, strict=True)):
        return None
    return low, tuple(end - begin for begin, end in zip(low, high, strict=True))


def tiling_fault(shape: Ints, boxes: Sequence[Box]) -> str | None:
    """Why boxes do not cover a tensor of `shape` exactly once; None when they do."""
    for box in boxes:
        inside = all(o >= 0 and n > 0 and o + n <= s for o, n, s in zip(box.offsets, box.sizes, shape, strict=True))
        if not inside:
            return f"the piece at {list(box.offsets)} of sizes {list(box.sizes)} leaves the shape {list(shape)}"
    total, covered = math.prod(shape), sum(box.numel for box in boxes)
    if covered < total:
        return f"the pieces hold {covered} of {total} elements of shape {list(shape)}"
    return f"pieces of shape {list(shape)} overlap" if covered > total else _overlap_fault(shape, boxes)


def ranges_fault(total: int, ranges: Iterable[tuple[int, int]]) -> str | None:
    """Why flat ranges (start, length) do not cover `total` elements exactly once; None when they do."""
    position = 0
    for start, length in sorted(ranges):
        if length <= 0 or start != position:
            return f"the range of {length} at {start} should begin at {position}"
        position += length
    return None if position == total else f"the pieces hold {position} of {total} elements"


def _overlap_fault(shape: Ints, boxes: Sequence[Box]) -> str | None:
    """The fault when two boxes share an element, else None. Only boxes that overlap in one dimension are compared. It
    is the dimension with the fewest overlaps, so that cuts along any dimension cost little."""
    if not shape:
        return "two pieces of one element" if len(boxes) > 1 else None
    low = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    high = low + np.array([box.sizes for box in boxes], dtype=np.int64).reshape(low.shape)
    next_one = np.arange(1, len(boxes) + 1)
    best: tuple[int, Any, Any] | None = None
    for dim in range(len(shape)):
        order = np.argsort(low[:, dim], kind="stable")
        # the first box that begins after the end of this one
        last = np.searchsorted(low[order, dim], high[order, dim], side="left")
        count = int((last - next_one).sum())
        if best is None or count < best[0]:
            best = count, order, last
    assert best is not None
    count, order, last = best
    if count * len(shape) > COMPARISONS_LIMIT:
        return f"{len(boxes)} pieces of shape {list(shape)} are cut too finely to be checked"
    low, high = low[order], high[order]
    for i in np.flatnonzero(last > next_one):
        rivals = slice(i + 1, int(last[i]))
        if ((low[rivals] < high[i]) & (high[rivals] > low[i])).all(axis=1).any():
            return f"pieces of shape {list(shape)} overlap"
    return None
