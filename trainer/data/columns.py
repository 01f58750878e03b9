"""Samples of named arrays, stored column by column and read memory-mapped.

<split>.<column>.npy            all samples one after the other, along their first dimension
<split>.<column>.offsets.npy    where each sample begins, and the end; only where first dimensions differ
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import files

_NAME = re.compile("[A-Za-z0-9_]+")
_FLUSH = 1 << 16  # offsets held in memory


class ColumnsWriter:
    """Writes one split of a source. All samples have the same columns, each of one dtype and shape; the first dimension
    may differ between samples. Raises ValueError for other columns: the task makes them, so that is its bug."""

    def __init__(self, folder: Path, split: str) -> None:
        self.count = 0
        self._folder, self._split = folder, split
        self._columns: dict[str, _ColumnWriter] = {}

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add one sample."""
        if not self._columns:
            for name, array in columns.items():
                if not _NAME.fullmatch(name):
                    raise ValueError(f"a column of samples cannot be called {name!r}")
                self._columns[name] = _ColumnWriter(self._folder, f"{self._split}.{name}", array)
        if columns.keys() != self._columns.keys():
            raise ValueError(f"a sample has the columns {sorted(columns)}, those before it {sorted(self._columns)}")
        for name, array in columns.items():
            self._columns[name].add(array)
        self.count += 1

    def close(self) -> dict[str, Any]:
        """Complete the files. Returns what `ColumnSamples` needs to know, as plain data."""
        return {"samples": self.count, "columns": {name: column.close() for name, column in self._columns.items()}}

    def abandon(self) -> None:
        for column in self._columns.values():
            column.abandon()


class _ColumnWriter:
    def __init__(self, folder: Path, name: str, first: np.ndarray) -> None:
        if first.dtype.kind not in "biufc":
            raise ValueError(f"column {name} holds {first.dtype}, numbers were expected")
        self._name, self._offsets_path = name, folder / f"{name}.offsets.npy"
        self._dtype, self._shape = first.dtype, first.shape
        self._values = files.ArrayWriter(folder / f"{name}.npy", first.dtype, first.shape[1:])
        self._count = 0
        self._offsets: files.ArrayWriter | None = None  # made when first dimensions differ
        self._waiting: list[int] = []

    def add(self, array: np.ndarray) -> None:
        if array.dtype != self._dtype or array.ndim != len(self._shape) or array.shape[1:] != self._shape[1:]:
            raise ValueError(
                f"column {self._name}: {array.dtype} of shape {array.shape}, "
                f"{self._dtype} of shape {self._shape} came before"
            )
        if self._offsets is None and array.shape != self._shape:
            self._begin_offsets()
        if self._offsets is not None:
            self._waiting.append(self._values.count)
            if len(self._waiting) >= _FLUSH:
                self._flush(self._offsets)
        self._values.add(array.reshape(1) if array.ndim == 0 else array)
        self._count += 1

    def _begin_offsets(self) -> None:
        self._offsets = files.ArrayWriter(self._offsets_path, np.dtype(np.int64))
        for begin in range(0, self._count, _FLUSH):
            self._offsets.add(np.arange(begin, min(begin + _FLUSH, self._count)) * self._shape[0])

    def _flush(self, offsets: files.ArrayWriter) -> None:
        offsets.add(np.array(self._waiting, dtype=np.int64))
        self._waiting.clear()

    def close(self) -> dict[str, Any]:
        if self._offsets is not None:
            self._waiting.append(self._values.count)
            self._flush(self._offsets)
            self._offsets.close()
        self._values.close()
        ragged = self._offsets is not None
        return {
            "dtype": self._values.dtype.str,
            "shape": [None if ragged else n for n in self._shape[:1]] + [*self._shape[1:]],
        }

    def abandon(self) -> None:
        self._values.abandon()
        if self._offsets is not None:
            self._offsets.abandon()


class ColumnSamples:
    """The mapped files of a `ColumnsWriter`; see `Samples`. `facts` is what its `close` returned."""

    def __init__(self, folder: Path, split: str, facts: Mapping[str, Any]) -> None:
        self._count = int(facts["samples"])
        self._fixed: dict[str, np.ndarray] = {}  # arrays whose first dimension is the samples
        self._ragged: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, fact in facts["columns"].items():
            values, shape = files.map_array(folder / f"{split}.{name}.npy"), fact["shape"]
            offsets = None
            if shape[:1] == [None]:
                offsets = files.map_array(folder / f"{split}.{name}.offsets.npy")
                whole = len(offsets) == self._count + 1 and values.shape == (int(offsets[-1]), *shape[1:])
            else:
                whole = values.shape == ((self._count, *shape) if not shape else (self._count * shape[0], *shape[1:]))
            if not whole or values.dtype.str != fact["dtype"]:
                raise ValueError(f"{folder} does not hold what its meta.json says")
            if offsets is not None:
                self._ragged[name] = (values, offsets)
            else:
                self._fixed[name] = values.reshape(self._count, *shape)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The columns of a sample, as views of the files."""
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        columns = {name: values[index, ...] for name, values in self._fixed.items()}
        for name, (values, offsets) in self._ragged.items():
            columns[name] = values[offsets[index] : offsets[index + 1]]
        return columns

    def cost(self, index: int) -> int:
        return 1


def open_columns(folder: Path, meta: Mapping[str, Any]) -> dict[str, ColumnSamples]:
    """The splits of a prepared source, by name."""
    return {split: ColumnSamples(folder, split, facts) for split, facts in meta["splits"].items()}
