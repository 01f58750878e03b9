"""Pieces: parts of global tensors, identified by parameter name and place, never by rank.

A piece is a box (offsets and sizes per dimension) or a flat range (start and length in row-major order) of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import xxhash

from trainer.checkpoint.format.boxes import GROUPS, Group, Ints, box_label, range_label

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one tensor.

    `key` is "<parameter>" or "<parameter>.<state>". `tensor` is live, on any device. Its row-major content is the box
    (`offsets`, `sizes`) of the global tensor of `shape`. With a `start`, it is the flat range of that tensor's
    row-major order that begins there; offsets and sizes are then empty. A 0-d tensor has empty tuples.

    `replicas` ranks hold the same piece, and this is number `replica` of them. Exactly one of them writes the piece. A
    piece that is not `original` is a copy of lower precision: it is never written, and the store must carry the
    original over.
    """

    key: str
    group: Group
    tensor: torch.Tensor
    shape: Ints
    offsets: Ints
    sizes: Ints
    replica: int = 0
    replicas: int = 1
    start: int | None = None
    original: bool = True

    @property
    def label(self) -> str:
        """The piece's name in the file."""
        return box_label(self.key, self.offsets) if self.start is None else range_label(self.key, self.start)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def is_mine(self) -> bool:
        """Whether this replica writes the piece. A hash of the place decides: replicas share the work evenly."""
        return xxhash.xxh3_64_intdigest(self.label.encode()) % self.replicas == self.replica

    def check(self) -> None:
        """Raise ValueError when the piece contradicts itself, which is an engine's bug."""
        numel = self.tensor.numel()
        if self.tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{self.key}: dtype {self.tensor.dtype} has no name in safetensors")
        if self.group not in GROUPS or not 0 <= self.replica < self.replicas:
            raise ValueError(f"{self.key}: group {self.group!r}, replica {self.replica} of {self.replicas}")
        if self.start is not None:
            fits = not self.offsets and not self.sizes and 0 <= self.start <= math.prod(self.shape) - numel
        else:
            dims = list(zip(self.offsets, self.sizes, self.shape, strict=True))
            fits = math.prod(self.sizes) == numel and all(min(o, n) >= 0 and o + n <= s for o, n, s in dims)
        if not fits:
            raise ValueError(
                f"{self.key}: a tensor of {numel} elements does not fill offsets {self.offsets}, sizes {self.sizes}, "
                f"start {self.start} of shape {self.shape}"
            )


def with_state_to_come(pieces: Sequence[Piece], state: Mapping[str, Sequence[str]]) -> list[Piece]:
    """The pieces, and for each parameter the tensors that the optimizer will keep for it (`state`: their names) and has
    not made yet, as it makes them in its first update. They are as large as the parameter, which stands for them."""
    there = {piece.key for piece in pieces}
    to_come = [
        replace(piece, key=f"{piece.key}.{name}", group="optim")
        for piece in pieces
        for name in (state.get(piece.key, ()) if piece.group == "model" else ())
        if f"{piece.key}.{name}" not in there
    ]
    return [*pieces, *to_come]
