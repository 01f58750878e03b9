"""Images and labels in the files of MNIST: two files, each with a small header. Each may be compressed by gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from configs.errors import UserError
from configs.files import open_regular
from configs.schema.data import Source
from trainer.data.listing import readable

_UINT8 = 8
_READ_BYTES = 1 << 20
_IMAGE_BYTES = 64 << 20  # a header that gives more is no header
_GZIP = b"\x1f\x8b"


def labels_of(source: Source, found: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """(name, path) of the label files, one for each file of images. Raises UserError where one is missing."""
    if source.labels is not None and len(found) > 1:
        raise UserError(
            f"data source {source.name!r}: labels names one file, but there are {len(found)} of images\n"
            "set path to one file, or leave labels out: they are found by the names of the images"
        )
    labels = []
    for name, path in found:
        own = _labels_path(source, path)
        with readable(source, own):
            if not own.exists():
                raise UserError(
                    f"data source {source.name!r}: the labels of {path} are not there: {own}\n"
                    "put them there, or set `labels` of this data.sources entry"
                )
        labels.append((f"{name} labels", own))
    return labels


def _labels_path(source: Source, path: Path) -> Path:
    if source.labels is not None:
        return Path(source.labels).absolute()
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    if name == path.name:
        raise UserError(
            f"data source {source.name!r}: the name of {path} does not tell where its labels are\n"
            "set `labels` of this data.sources entry"
        )
    return path.with_name(name)


def read_idx(source: Source, path: Path, poll: Callable[[int], None]) -> Iterator[tuple[str, np.ndarray, int]]:
    """(place, image (H, W) of uint8, label) of each image. Raises UserError for files that do not fit each other."""
    ((_, labels_path),) = labels_of(source, [(path.name, path)])
    with _opened(path, "images", 3) as images, _opened(labels_path, "labels", 1) as labels:
        if images.count != labels.count:
            raise UserError(
                f"{path} holds {images.count:,} images, {labels_path} {labels.count:,} labels\n"
                "set path and labels of this data.sources entry to files that belong together"
            )
        size = int(np.prod(images.item))
        at_once = max(_READ_BYTES // size, 1)
        for begin in range(0, images.count, at_once):
            count = min(at_once, images.count - begin)
            block = np.frombuffer(images.read(count * size), np.uint8).reshape(count, *images.item)
            numbers = labels.read(count)
            poll(block.nbytes + count)
            for offset in range(count):
                yield f"{path}: image {begin + offset}", block[offset], numbers[offset]
        images.check_end()
        labels.check_end()


@dataclass
class _Idx:
    """An open file, read up to the end of its header."""

    path: Path
    file: BinaryIO
    count: int
    item: tuple[int, ...]

    def read(self, size: int) -> bytes:
        data = _read(self.path, self.file, size)
        if len(data) < size:
            raise UserError(f"{self.path} is cut short: its header says {self.count:,} items\nget the file again")
        return data

    def check_end(self) -> None:
        if _read(self.path, self.file, 1):
            raise UserError(f"{self.path} goes on behind the {self.count:,} items of its header\nget the file again")


@contextmanager
def _opened(path: Path, what: str, dimensions: int) -> Iterator[_Idx]:
    with open_regular(path) as plain:
        compressed = plain.read(2) == _GZIP
        plain.seek(0)
        file = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if compressed else plain
        head = _read(path, file, 4 + 4 * dimensions)
        if len(head) < 4 or head[:3] != bytes([0, 0, _UINT8]) or head[3] not in (1, 3):
            raise UserError(
                f"{path} is no idx file of uint8 {what}: it begins with {head[:4].hex(' ') or 'nothing'}, "
                f"00 00 08 {dimensions:02x} was expected\nset path, pattern and labels of this data.sources entry"
            )
        if head[3] != dimensions:
            holds = "labels" if head[3] == 1 else "images"
            raise UserError(
                f"{path} holds {holds}, {what} were expected\nset path, pattern and labels of this data.sources entry"
            )
        if len(head) < 4 + 4 * dimensions:
            raise UserError(f"{path} is cut short, inside its header\nget the file again")
        count, *item = (int(n) for n in np.frombuffer(head, ">u4", offset=4))
        if not 0 < int(np.prod(item, dtype=object)) <= _IMAGE_BYTES:
            raise UserError(
                f"{path}: its header says images of {' x '.join(map(str, item))} pixels\nget the file again"
            )
        yield _Idx(path, file, count, tuple(item))


def _read(path: Path, file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, or fewer at the end of the file."""
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or damaged: {str(error).rstrip('.')}\nget the file again") from None
