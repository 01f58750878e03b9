"""The store of samples: what is written can be read, whatever its shape."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainer.data import columns as module
from trainer.data.columns import ColumnSamples, ColumnsWriter, open_columns

Sample = dict[str, np.ndarray]


def write(folder: Path, samples: list[Sample], split: str = "train") -> dict[str, Any]:
    writer = ColumnsWriter(folder, split)
    for sample in samples:
        writer.add(sample)
    return json.loads(json.dumps(writer.close()))


def check(folder: Path, samples: list[Sample]) -> ColumnSamples:
    read = ColumnSamples(folder, "train", write(folder, samples))
    assert len(read) == len(samples)
    for index, sample in enumerate(samples):
        found = read.read(index)
        assert found.keys() == sample.keys()
        for name, array in sample.items():
            assert found[name].dtype == array.dtype.newbyteorder("<")
            np.testing.assert_array_equal(found[name], array, strict=False)
            assert found[name].shape == array.shape
        assert read.cost(index) == 1
    return read


DTYPES = st.sampled_from([np.dtype(d) for d in ("u1", "<i8", ">i4", "<f4", "<f8", "?")])


@st.composite
def some_samples(draw: st.DrawFn) -> list[Sample]:
    plans = draw(
        st.lists(
            st.tuples(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3), st.booleans()),
            min_size=1,
            max_size=3,
        )
    )
    samples = []
    for _ in range(draw(st.integers(0, 6))):
        sample = {}
        for number, (dtype, shape, ragged) in enumerate(plans):
            own = (draw(st.integers(0, 3)), *shape[1:]) if ragged and shape else shape
            sample[f"c{number}"] = draw(hnp.arrays(dtype, own))
        samples.append(sample)
    return samples


@settings(max_examples=60, deadline=None)
@given(some_samples())
def test_what_is_written_is_read(samples: list[Sample]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), samples)


def test_a_column_that_becomes_ragged_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offsets of the earlier samples are then written, in parts."""
    monkeypatch.setattr(module, "_FLUSH", 3)
    check(tmp_path, [{"x": np.full((2, 2), i)} for i in range(8)] + [{"x": np.full((n, 2), n)} for n in (0, 5, 1, 2)])


def test_of_one_shape_there_are_no_offsets(tmp_path: Path) -> None:
    check(tmp_path, [{"x": np.zeros((2, 3), np.float32), "label": np.array(i)} for i in range(4)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.label.npy", "train.x.npy"]
    assert np.load(tmp_path / "train.x.npy").shape == (8, 3)


def test_samples_are_views_of_the_map(tmp_path: Path) -> None:
    read = check(tmp_path, [{"x": np.arange(i, dtype=np.int64), "y": np.arange(2)} for i in range(1, 5)])
    for array in read.read(2).values():
        assert not array.flags.writeable
        assert not array.flags.owndata
    for index in (-1, 4):
        with pytest.raises(IndexError):
            read.read(index)


def test_a_split_without_samples(tmp_path: Path) -> None:
    meta = {"splits": {"train": write(tmp_path, [{"x": np.arange(2)}]), "test": write(tmp_path, [], "test")}}
    assert {split: len(samples) for split, samples in open_columns(tmp_path, meta).items()} == {"train": 1, "test": 0}


@pytest.mark.parametrize(
    "second",
    [
        {"x": np.zeros(2, np.float64), "y": np.array(1)},
        {"x": np.zeros((2, 1), np.float32), "y": np.array(1)},
        {"x": np.zeros(2, np.float32)},
        {"x": np.zeros(2, np.float32), "y": np.zeros(1, int)},
    ],
)
def test_samples_that_differ_are_refused(tmp_path: Path, second: Sample) -> None:
    writer = ColumnsWriter(tmp_path, "train")
    writer.add({"x": np.zeros(2, np.float32), "y": np.array(1)})
    with pytest.raises(ValueError, match="column"):
        writer.add(second)
    writer.abandon()


@pytest.mark.parametrize("sample", [{"a/b": np.zeros(1)}, {"x.offsets": np.zeros(1)}, {"x": np.array(["text"])}])
def test_what_cannot_be_stored_is_refused(tmp_path: Path, sample: Sample) -> None:
    with pytest.raises(ValueError, match="column"):
        ColumnsWriter(tmp_path, "train").add(sample)


def test_damaged_files_are_seen(tmp_path: Path) -> None:
    """A file from another node may be short for a while: `Prepared.open` tries again on ValueError."""
    samples = [{"x": np.arange(i, dtype=np.int64), "y": np.arange(2)} for i in range(3)]
    facts = write(tmp_path, samples)
    other = tmp_path / "other"
    other.mkdir()
    write(other, samples[:2])
    for name in ("train.x.npy", "train.x.offsets.npy", "train.y.npy"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes((other / name).read_bytes())
        with pytest.raises(ValueError, match="does not hold"):
            ColumnSamples(tmp_path, "train", facts)
        (tmp_path / name).write_bytes(kept[:-1])
        with pytest.raises(ValueError):
            ColumnSamples(tmp_path, "train", facts)
        (tmp_path / name).write_bytes(kept)
    ColumnSamples(tmp_path, "train", facts)
