"""Records of tables and images: what is read, and the errors for bad input."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema.data import DataSection, Source
from trainer.data.listing import check_source, list_files
from trainer.data.records import Record, digest_of, read_records


def read(kind: str, path: Path | str, **keys: Any) -> list[Record]:
    source = Source.model_validate({"name": "s", "kind": kind, "path": str(path), **keys})
    return list(read_records(source, Path(path), lambda size: None))


def refused(act: Callable[[], Any], *parts: str) -> str:
    """Check that the error is one or two lines with these parts in this order; returns it."""
    with pytest.raises(UserError) as error:
        act()
    said = str(error.value)
    assert 1 <= len(said.splitlines()) <= 2, said
    at = 0
    for part in parts:
        assert part in said[at:], said
        at = said.index(part, at) + len(part)
    return said


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- CSV -------------------------------------------------------------------------------------------------------------


def test_a_csv_gives_text_by_column(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", '\ufeffa,b\r\n1,"x, ""y""\n"\r\n\r\n,Grüße\n')
    first, second = read("csv", path)
    assert (first.values, second.values) == ({"a": "1", "b": 'x, "y"\n'}, {"a": "", "b": "Grüße"})
    assert (first.place, second.place) == (f"{path}:2", f"{path}:5")
    assert len(first.digest) == 16 != second.digest


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["{path} is empty", "'s'", "a first line", "write one"]),
        ("\n\n", ["{path} is empty", "write one"]),
        ("a,b\n1,2\n3\n", ["{path}:3: 1 cell, but the first line names 2 columns", "correct this line"]),
        ("a,b\n1,2\n\n3,4,5\n", ["{path}:4: 3 cells, but the first line names 2 columns", "double quotes"]),
        ("a,b\n1,2\n3,x\0y\n", ["{path}:3: a NUL byte", "remove it"]),
        (b"a,b\n1,2\n3,Gr\xfc\xdfe\n", ["{path}:3: not UTF-8", "iconv"]),
        ("a,b\n1,2\n".encode("utf-16"), ["{path} is UTF-16", "convert it to UTF-8"]),
        ("a,b,a\n1,2,3\n", ["{path}:1: the column 'a' stands twice", "rename"]),
        (",a\n0,1\n", ["{path}:1: column 1 has no name", "index=False"]),
        ("a, ,c\n0,1,2\n", ["{path}:1: column 2 has no name"]),
        ('a,b\n1,2\n3,"x\n5,6\n', ["{path}:3: a double quote is opened in this row and never closed", "doubled"]),
        ('a,b\n1,2\n"x"y,4\n', ["{path}:3: double quotes that are no CSV", "doubled"]),
        ('a,b\n1,"' + "x" * 200_000 + '"\n', ["{path}:2: a cell of more than 131,072 characters", "closed"]),
        ("a,b\r1,2\r", ["{path}:1: a carriage return", "line ends"]),
        ("a;b\n1;2\n", ["{path}:1: cells are divided by ';'", "commas"]),
        ("a\tb\n1\t2\n", ["{path}:1: cells are divided by tabs", "commas"]),
        ('{"a": 1, "b": 2}\n{"a": 3, "b": 4}\n', ["'s' has kind csv, but {path} is JSON Lines", "write it as CSV"]),
        (gzip.compress(b"a,b\n1,2\n" * 99, mtime=0), ["has kind csv, but {path} is gzip", "write it as CSV"]),
        (b"PAR1\x15\x04\x15\xff\x00\xff", ["has kind csv, but {path} is Parquet", "set kind: parquet"]),
    ],
)
def test_a_bad_csv_is_refused_with_the_line(tmp_path: Path, content: str | bytes, parts: list[str]) -> None:
    path = write(tmp_path / "t.csv", content)
    refused(lambda: read("csv", path), *(part.format(path=path) for part in parts))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.tables._LINE_BYTES", 20)
    path = write(tmp_path / "t.csv", "a,b\n" + "1" * 30)
    refused(lambda: read("csv", path), f"{path}:2: a line of more than", "each row")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for kind in ("csv", "parquet", "idx"):
        refused(lambda kind=kind: read(kind, tmp_path / "images"), "'s'", str(tmp_path))


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=8)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    header = draw(st.lists(TEXT.filter(str.strip), min_size=1, max_size=4, unique=True))
    assume(len(header) > 1 or not set(header[0]) & set(";\t|"))
    return header, draw(st.lists(st.lists(TEXT, min_size=len(header), max_size=len(header)), max_size=5))


@settings(max_examples=150, deadline=None)
@given(tables(), st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans())
def test_what_csv_writes_is_read(table: Any, end: str, quoting: Any, bom: bool) -> None:
    header, rows = table
    assume(bom or not header[0].startswith("\ufeff"))
    text = io.StringIO()
    # Always "\r\n" for the writer: it quotes only the characters of its own line end.
    csv.writer(text, quoting=quoting).writerows([header, *rows])
    content = (
        text.getvalue()
        if end == "\r\n" or any("\r" in c for row in [header, *rows] for c in row)
        else (text.getvalue().replace("\r\n", "\n"))
    )
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "t.csv"), ("\ufeff" if bom else "") + content)
        records = read("csv", path)
    assert [record.values for record in records] == [dict(zip(header, row, strict=True)) for row in rows]


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def parquet(path: Path, table: pyarrow.Table, rows: int = 1000) -> Path:
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def test_parquet_gives_numbers_text_and_nulls(tmp_path: Path) -> None:
    columns = {
        "n": pyarrow.array([1, None, 3]),
        "f": pyarrow.array([0.5, 1.5, None], pyarrow.float16()),
        "s": pyarrow.array(["x", None, "ü"]),
        "b": pyarrow.array([True, False, None]),
        "none": pyarrow.nulls(3),
        "category": pyarrow.array(["u", "v", "u"]).dictionary_encode(),
        "decimal": pyarrow.array([1, 2, 3]).cast(pyarrow.decimal128(21, 2)),
    }
    path = parquet(tmp_path / "t.parquet", pyarrow.table(columns), rows=2)
    first, second, third = read("parquet", path)
    assert first.values == {"n": 1, "f": 0.5, "s": "x", "b": True, "none": None, "category": "u", "decimal": 1.0}
    assert second.values["n"] is second.values["s"] is third.values["b"] is None
    assert third.place == f"{path}: row 3"


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pyarrow.array([[1], [2]]), "nested values"),
        (pyarrow.array([{"a": 1}, {"a": 2}]), "nested values"),
        (pyarrow.array([b"x", b"y"]), "values of type binary"),
        (pyarrow.array([1, 2]).cast(pyarrow.timestamp("s")), "values of type timestamp"),
    ],
)
def test_other_types_of_parquet_are_refused(tmp_path: Path, column: Any, what: str) -> None:
    path = parquet(tmp_path / "t.parquet", pyarrow.table({"a": [1, 2], "odd": column}))
    refused(lambda: read("parquet", path), f"{path}: the column 'odd' holds {what}", "leave it out")


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", pyarrow.table({"a": list(range(5000)), "b": ["x" * 9] * 5000}))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[4:2000] = bytes(1996)
    for content in (b"", b"a,b\n1,2\n", whole[:-20], whole[40:], bytes(damaged)):
        path.write_bytes(content)
        refused(lambda: read("parquet", path), "'s'", f"{path} is not Parquet, or damaged", "set kind")
    parquet(path, pyarrow.table([[1], [2]], names=["a", "a"]))
    refused(lambda: read("parquet", path), f"{path}: the column 'a' stands twice", "rename")
    parquet(path, pyarrow.table({}))
    refused(lambda: read("parquet", path), f"{path} has no columns", "write it again")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "t.parquet", pyarrow.table({"a": [1]}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: read("parquet", path), "pyarrow, which is not installed", "pip install 'muster[tables]'")
    digits = Source(name="s", kind="idx", path="python:digits")
    refused(lambda: check_source(digits), "sklearn, which is not installed", "pip install scikit-learn")


# ---- idx -------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
LABELS = np.array([3, 1, 4, 1, 5], np.uint8)


def mnist(folder: Path, images: bytes, labels: bytes | None, end: str = "") -> Path:
    if labels is not None:
        (folder / f"train-labels-idx1-ubyte{end}").write_bytes(labels)
    return write(folder / f"train-images-idx3-ubyte{end}", images)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_is_read_in_pieces(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.idx._READ_BYTES", 24)  # two images
    pack = gzip.compress if end else bytes
    path = mnist(tmp_path, pack(idx(IMAGES)), pack(idx(LABELS)), end)
    records = read("idx", path)
    np.testing.assert_array_equal([r.values["image"] for r in records], IMAGES)
    assert [r.values["label"] for r in records] == LABELS.tolist()
    assert records[0].values["image"].dtype == np.uint8
    assert records[4].place == f"{path}: image 4"
    found = list_files(Source(name="s", kind="idx", path=str(tmp_path)), lambda: None)
    assert [p for _, p in found] == [path]  # labels are no images


@pytest.mark.parametrize(
    ("images", "labels", "parts"),
    [
        (idx(IMAGES)[:-1], idx(LABELS), ["images-idx3-ubyte is cut short", "5 items", "get the file again"]),
        (idx(IMAGES)[:9], idx(LABELS), ["images-idx3-ubyte is cut short, inside its header", "again"]),
        (idx(IMAGES), idx(LABELS)[:-1], ["labels-idx1-ubyte is cut short", "5 items", "again"]),
        (idx(IMAGES) + b"x", idx(LABELS), ["images-idx3-ubyte goes on behind", "again"]),
        (idx(IMAGES), idx(LABELS) + b"x", ["labels-idx1-ubyte goes on behind", "again"]),
        (idx(IMAGES), idx(LABELS[:4]), ["holds 5 images", "4 labels", "set path and labels"]),
        (b"", idx(LABELS), ["no idx file of uint8 images", "begins with nothing", "set path"]),
        (b"PNG\n" * 9, idx(LABELS), ["no idx file of uint8 images", "50 4e 47 0a", "00 00 08 03", "set path"]),
        (idx(IMAGES, kind=13), idx(LABELS), ["no idx file of uint8 images", "00 00 0d 03", "set path"]),
        (idx(LABELS), idx(LABELS), ["images-idx3-ubyte holds labels, images were expected", "set path"]),
        (idx(IMAGES), idx(IMAGES), ["labels-idx1-ubyte holds images, labels were expected", "labels"]),
        (idx(IMAGES[:, :0]), idx(LABELS), ["its header says images of 0 x 3 pixels", "again"]),
        (idx(IMAGES)[:8] + b"\xff" * 8, idx(LABELS), ["images of 4294967295 x 4294967295 pixels", "again"]),
        (gzip.compress(idx(IMAGES), mtime=0)[:-9], idx(LABELS), ["images-idx3-ubyte is cut short", "again"]),
        (b"\x1f\x8bxxxxxxxxx", idx(LABELS), ["images-idx3-ubyte is cut short or damaged", "again"]),
        (idx(IMAGES), None, ["the labels of", "are not there", "train-labels-idx1-ubyte", "set `labels`"]),
    ],
)
def test_bad_idx_is_refused(tmp_path: Path, images: bytes, labels: bytes | None, parts: list[str]) -> None:
    path = mnist(tmp_path, images, labels)
    refused(lambda: read("idx", path), *parts)


def test_labels_may_be_named(tmp_path: Path) -> None:
    images, labels = write(tmp_path / "x.idx", idx(IMAGES)), write(tmp_path / "y.idx", idx(LABELS))
    refused(lambda: read("idx", images), f"the name of {images} does not tell", "set `labels`")
    assert len(read("idx", images, labels=str(labels))) == 5


# ---- scikit-learn ----------------------------------------------------------------------------------------------------


def test_digits_and_diabetes() -> None:
    digits = read("idx", "python:digits")
    assert len(digits) == 1797
    image = digits[0].values["image"]
    assert (image.shape, image.dtype, image.max(), digits[0].values["label"]) == ((8, 8), np.uint8, 15, 0)
    table = read("csv", "python:diabetes")
    assert len(table) == 442
    assert list(table[0].values) == ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6", "target"]
    assert table[0].values["age"] == 59.0
    assert table[0].place == "python:diabetes: row 1"
    for kind, path in (("csv", "python:digits"), ("text", "python:digits"), ("idx", "python:diabetes")):
        wrong = Source.model_validate({"name": "s", "kind": kind, "path": path})
        refused(lambda wrong=wrong: list_files(wrong, lambda: None), "'s'", path, "set its kind to")
        refused(lambda wrong=wrong: check_source(wrong), "set its kind to")
    assert list_files(Source(name="s", kind="idx", path="python:digits"), lambda: None) == []


# ---- digests, config -------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", "a,b,c\n1,x,\n2,y,0.5\n")
    other = write(tmp_path / "other.csv", "c,b,a\n9,9,9\n0.5,y,2\n,x,1\n")
    table = parquet(tmp_path / "t.parquet", pyarrow.table({"a": [1, 2], "b": ["x", "y"], "c": [None, 0.5]}))
    first, second = (r.digest for r in read("csv", one))
    assert [r.digest for r in read("csv", other)][1:] == [second, first]
    assert [r.digest for r in read("parquet", table)] == [first, second]


def test_other_content_has_another_digest() -> None:
    a, b = np.arange(4, dtype=np.uint8).reshape(2, 2), np.arange(4, dtype=np.uint8)
    values: list[dict[str, Any]] = [
        {"x": "1,2"},
        {"x": "1", "y": "2"},
        {"y": "1,2"},
        {"x": a},
        {"x": b},
        {"x": b, "y": 0},
    ]
    values += [{"x": b + 1}, {"x": b, "y": 1}, {"x": b[:2], "y": b[2:]}, {"x": b[:3], "y": b[3:]}]
    assert len({digest_of(v) for v in values}) == len(values)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sources": [{"name": "t", "path": "x", "split": "test"}]}, "split is for csv, parquet and idx"),
        ({"sources": [{"name": "t", "kind": "csv", "path": "x", "labels": "y"}]}, "labels is for idx"),
        ({"sources": [{"name": "t", "path": "x"}], "test_fraction": 0.1}, "test_fraction is for csv"),
        (
            {"sources": [{"name": "t", "path": "x"}, {"name": "r", "kind": "csv", "path": "x"}]},
            "'r' (kind csv) holds records, 't' (kind text) documents",
        ),
        (
            {"sources": [{"name": "r", "kind": "csv", "path": "x"}], "test_fraction": 0.5, "validation_fraction": 0.5},
            "validation_fraction + test_fraction must be below 1",
        ),
    ],
)
def test_what_does_not_fit_in_a_config(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        DataSection.model_validate({"seq_len": 8, **data})
    assert said in str(error.value)
