"""Rows of tables, CSV or Parquet, one after the other, in bounded memory."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import UserError
from configs.files import open_regular
from configs.schema.data import Source
from trainer.data.content import ARRAY, EMPTY, JSON, TEXT, content_of
from trainer.data.listing import check_installed

_HEAD_BYTES = 64 << 10
_LINE_BYTES = 16 << 20  # a longer line is refused, since memory must hold it
_BATCH_ROWS = 1024
_READABLE = {TEXT, EMPTY, JSON, ARRAY, "not UTF-8", "binary"}  # for the last two, the error names the line
_ADVICE = {"Parquet": "set kind: parquet", "UTF-16 or UTF-32": "convert it to UTF-8, as iconv does"}

Row = tuple[str, dict[str, Any]]  # place for messages, cells by column
Poll = Callable[[int], None]  # called often with the number of bytes just read


def read_csv(source: Source, path: Path, poll: Poll) -> Iterator[Row]:
    """Rows of a CSV file; every cell is text. Raises UserError, with the line, unless it has a header and is UTF-8."""
    with open_regular(path) as file:
        _refuse_other_files(source, path, file.read(_HEAD_BYTES))
        file.seek(0)
        reader = csv.reader(_lines(path, file, poll), strict=True)
        header = _next_row(path, reader)
        while header == []:  # skips blank lines
            header = _next_row(path, reader)
        if header is None:
            raise UserError(
                f"{path} is empty (data source {source.name!r}): a first line with the names of columns was expected\n"
                "write one, or narrow `pattern` of this data.sources entry"
            )
        _check_header(path, reader.line_num, header)
        while True:
            begin = reader.line_num + 1
            row = _next_row(path, reader)
            if row is None:
                return
            if not row:
                continue  # a blank line
            if len(row) != len(header):
                raise UserError(
                    f"{path}:{begin}: {_cells(len(row))}, but the first line names {len(header)} columns\n"
                    "correct this line; a cell that holds a comma or a line break stands in double quotes"
                )
            yield f"{path}:{begin}", dict(zip(header, row, strict=True))


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def _refuse_other_files(source: Source, path: Path, head: bytes) -> None:
    what = content_of(path.name, head, source.field)
    if what not in _READABLE:
        advice = _ADVICE.get(what, "write it as CSV, or narrow `pattern` of this data.sources entry")
        raise UserError(f"data source {source.name!r} has kind csv, but {path} is {what}\n{advice}")


def _lines(path: Path, file: BinaryIO, poll: Poll) -> Iterator[str]:
    """Lines as they are, with their ends, so that line breaks inside cells are kept."""
    number = 0
    while line := file.readline(_LINE_BYTES + 1):
        number += 1
        poll(len(line))
        if len(line) > _LINE_BYTES:
            raise UserError(f"{path}:{number}: a line of more than {_LINE_BYTES >> 20} MiB\nwrite each row on a line")
        if b"\0" in line:
            raise UserError(f"{path}:{number}: a NUL byte, which no CSV holds\nremove it, or write the file again")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{path}:{number}: not UTF-8\nconvert the file to UTF-8, as iconv does, or save it so in its program"
            ) from None
        yield text


def _next_row(path: Path, reader: Any) -> list[str] | None:
    """The next row, or None at the end."""
    begin = reader.line_num + 1
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise UserError(f"{path}:{begin}: {_fault(error, begin, reader.line_num)}") from None
    return row


def _fault(error: csv.Error, begin: int, end: int) -> str:
    """The message of Python's reader, in words for people."""
    said = str(error)
    if "unexpected end of data" in said:
        return "a double quote is opened in this row and never closed\nclose it; a quote inside a cell is doubled"
    if "field limit" in said:
        return (
            f"a cell of more than {csv.field_size_limit():,} characters, up to line {end}\n"
            "is a double quote not closed? A quote inside a cell is doubled"
        )
    if "new-line" in said:
        return "a carriage return without a line feed\nsave the file with line ends of Linux or Windows"
    where = f" (line {end})" if end > begin else ""
    return f"double quotes that are no CSV{where}: {said}\na quote inside a cell is doubled"


def _check_header(path: Path, line: int, header: list[str]) -> None:
    place = f"{path}:{line}"
    if len(header) == 1 and (found := next((mark for mark in ";\t|" if mark in header[0]), None)):
        named = "tabs" if found == "\t" else repr(found)
        raise UserError(f"{place}: cells are divided by {named}, commas were expected\nwrite the file with commas")
    _check_names(place, header)


def _check_names(place: str, names: list[str]) -> None:
    """Raise UserError for columns with equal or empty names: names distinguish columns."""
    empty = next((number for number, name in enumerate(names, start=1) if not name.strip()), None)
    if empty is not None:
        raise UserError(
            f"{place}: column {empty} has no name\ngive it one, or leave it out (of pandas: to_csv(..., index=False))"
        )
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise UserError(f"{place}: the column {twice!r} stands twice\nrename or remove one of them")


def read_parquet(source: Source, path: Path, poll: Poll) -> Iterator[Row]:
    """Rows of a Parquet file: numbers, strings, truth values, nulls. Raises UserError for other types and files."""
    check_installed(source)
    import pyarrow
    import pyarrow.parquet

    with open_regular(path) as opened:
        with _damage(source, path, pyarrow):
            file = pyarrow.parquet.ParquetFile(opened)
        names = file.schema_arrow.names
        if not names:
            raise UserError(f"{path} has no columns (data source {source.name!r})\nwrite it again")
        _check_names(str(path), names)
        casts = [_cast(path, field, pyarrow) for field in file.schema_arrow]
        batches, row = file.iter_batches(_BATCH_ROWS), 0
        while True:
            with _damage(source, path, pyarrow):
                batch = next(batches, None)
                if batch is None:
                    return
                columns = [column.cast(to).to_pylist() for column, to in zip(batch.columns, casts, strict=True)]
            poll(batch.nbytes)
            for cells in zip(*columns, strict=True):
                row += 1
                yield f"{path}: row {row}", dict(zip(names, cells, strict=True))


@contextmanager
def _damage(source: Source, path: Path, pyarrow: Any) -> Iterator[None]:
    """Turn pyarrow's error about a file into a UserError."""
    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file cannot be read
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data source {source.name!r}: {path} is not Parquet, or damaged: {told}\n"
            "write it again, or set kind, path and pattern of this data.sources entry"
        ) from None


def _cast(path: Path, field: Any, pyarrow: Any) -> Any:
    """The type that a column is read as. Raises UserError unless it is a number, string or truth value."""
    types, kind = pyarrow.types, field.type
    if types.is_dictionary(kind):  # categories of pandas
        kind = kind.value_type
    if types.is_floating(kind) or types.is_decimal(kind):
        return pyarrow.float64()
    if types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind):
        return kind
    if types.is_string(kind) or types.is_large_string(kind):
        return kind
    nested = "nested values" if types.is_nested(kind) else f"values of type {kind}"
    raise UserError(
        f"{path}: the column {field.name!r} holds {nested}\nwrite it as numbers, strings or true/false, or leave it out"
    )
