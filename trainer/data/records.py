"""The records of a source, one after the other, in bounded memory: rows of tables, labelled images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.schema.data import Source
from trainer.data.idx import read_idx
from trainer.data.listing import DIGITS, check_installed, is_in_package, readable
from trainer.data.sources import new_hash
from trainer.data.tables import read_csv, read_parquet

Value = str | float | int | np.ndarray | None  # a bool is an int


@dataclass
class Record:
    """`digest`: a hash of the content alone, so that copies get the same split. `place`: file and line or row."""

    digest: bytes
    place: str
    values: dict[str, Value]


def read_records(source: Source, path: Path, poll: Callable[[int], None]) -> Iterator[Record]:
    """The records of one file, or of the data set that `source.path` names. poll: called often with the bytes read.

    Raises UserError, with the place, for any fault in the file.
    """
    with readable(source, path):
        for place, values in _read(source, path, poll):
            yield Record(digest_of(values), place, values)


def _read(source: Source, path: Path, poll: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Value]]]:
    if is_in_package(source):
        yield from _read_package(source, poll)
    elif source.kind == "csv":
        yield from read_csv(source, path, poll)
    elif source.kind == "parquet":
        yield from read_parquet(source, path, poll)
    else:
        for place, image, label in read_idx(source, path, poll):
            yield place, {"image": image, "label": label}


def digest_of(values: Mapping[str, Value]) -> bytes:
    """A hash of 16 bytes. The order of columns does not count. A table gives the same hash as its CSV: 3, 3.5 and null
    count as "3", "3.5" and ""."""
    texts: list[tuple[str, ...]] = []
    arrays: list[np.ndarray] = []
    for name in sorted(values):
        value = values[name]
        if isinstance(value, np.ndarray):
            texts.append((name, value.dtype.str, str(value.shape)))
            arrays.append(np.ascontiguousarray(value))
        else:
            texts.append((name, "" if value is None else str(value)))
    digest = new_hash()
    digest.update(json.dumps(texts).encode())
    for array in arrays:
        digest.update(array)
    return bytes(digest.digest())


def _read_package(source: Source, poll: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Value]]]:
    """The data sets that come with scikit-learn."""
    check_installed(source)
    from sklearn import datasets

    if source.path == DIGITS:
        digits = datasets.load_digits()
        images = digits.images.astype(np.uint8)
        for number, (image, label) in enumerate(zip(images, digits.target.tolist(), strict=True)):
            poll(image.nbytes)
            yield f"{source.path}: image {number}", {"image": image, "label": label}
        return
    table = datasets.load_diabetes(scaled=False)
    for number, (row, target) in enumerate(zip(table.data.tolist(), table.target.tolist(), strict=True), start=1):
        poll(8 * len(row))
        yield f"{source.path}: row {number}", {**dict(zip(table.feature_names, row, strict=True)), "target": target}
