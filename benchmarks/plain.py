"""The plainest ways to read what a checkpoint's files hold, as something to compare with."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.format.boxes import Wanted, intersect
from trainer.checkpoint.format.writing import bytes_of
from trainer.checkpoint.load.checkpoint import Checkpoint

DIRECT_BYTES = 8 << 20  # per O_DIRECT read
PAGE = 4096


@dataclass(frozen=True)
class Layout:
    """A checkpoint and what each of its readers wants."""

    name: str
    path: Path
    readers: list[list[Wanted]]

    def load(self) -> None:
        """Each reading rank opens the checkpoint and reads its part, one rank after the other."""
        for wanted in self.readers:
            checkpoint = Checkpoint(self.path)
            checkpoint.read_all(wanted)
            checkpoint.close()

    def files(self) -> list[Path]:
        return sorted(self.path.glob("*/*.safetensors"))


def cut(size: int, parts: int, rank: int) -> tuple[int, int]:
    """(offset, length) of a rank's part of a dimension, as FSDP2 cuts it: the last ranks may get less or nothing."""
    chunk = -(-size // parts)
    begin, end = (min(r * chunk, size) for r in (rank, rank + 1))
    return begin, end - begin


def runs_of(layout: Layout) -> dict[Path, list[tuple[memoryview, int]]]:
    """File -> (memory, offset) of each run of wanted bytes, for boxes of matrices and vectors stored by rows."""
    manifest = Checkpoint(layout.path).manifest
    runs: dict[Path, list[tuple[memoryview, int]]] = {}
    for wanted in itertools.chain(*layout.readers):
        width, out = wanted.out.element_size(), bytes_of(wanted.out)
        length = wanted.sizes[-1] * width
        for place in manifest.places(wanted.key, wanted.offsets, wanted.sizes):
            offsets, sizes = intersect(place.box, wanted.offsets, wanted.sizes) or ((), ())
            column = (wanted.offsets[-1] - place.box.offsets[-1]) * width if len(sizes) > 1 else 0
            path = layout.path / manifest.files[place.file].path
            if len(sizes) == 1:
                here, there = (offsets[0] - wanted.offsets[0]) * width, (offsets[0] - place.box.offsets[0]) * width
                runs.setdefault(path, []).append((out[here : here + sizes[0] * width], place.byte + there))
                continue
            for row in range(offsets[0], offsets[0] + sizes[0]):
                here = (row - wanted.offsets[0]) * length
                there = (row - place.box.offsets[0]) * place.box.sizes[-1] * width + column
                runs.setdefault(path, []).append((out[here : here + length], place.byte + there))
    return runs


def read_runs(runs: dict[Path, list[tuple[memoryview, int]]]) -> None:
    """Read the same bytes into the same tensors, one `pread` for each run."""
    for path, parts in runs.items():
        fd = os.open(path, os.O_RDONLY)
        for out, start in parts:
            assert os.preadv(fd, [out], start) == len(out)
        os.close(fd)


def read_plainly(path: Path, begin: int, memory: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while len(memory):
            memory = memory[file.readinto(memory) or 0 :]


def read_directly(path: Path, begin: int, memory: memoryview) -> None:
    """Read by O_DIRECT, without the last bytes, which do not fill a page."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    whole = len(memory) // PAGE * PAGE
    for part in range(0, whole, DIRECT_BYTES):
        assert os.preadv(fd, [memory[part : min(part + DIRECT_BYTES, whole)]], begin + part)
    os.close(fd)


def forget(layout: Layout) -> None:
    """Drop the files from the page cache. They are durable, so no unwritten page stays in it."""
    for path in layout.files():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
