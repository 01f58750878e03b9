"""What a file holds, by its first bytes, and whether that fits the `kind` of its source."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from configs.errors import UserError
from configs.files import open_regular
from configs.schema.data import Source
from trainer.data.listing import first_three, refuse_unreadable

_HEAD_BYTES = 64 << 10
_BINARY_SHARE = 0.4  # of bytes that no text holds; compressed files have 0.55, texts in Latin-1 0.05
NUMPY = b"\x93NUMPY"
TEXT, EMPTY, NPY = "text", "empty", "a .npy array"
JSONL, WITH_FIELD = "JSON Lines", "JSON Lines with the field"
JSON, ARRAY = "JSON", "a JSON array"

_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b")) + b"\x7f"
_BEGINNINGS = (
    (rb"\x93NUMPY", NPY),
    (rb"PAR1", "Parquet"),
    (rb"ARROW1", "Arrow"),
    (rb"\x1f\x8b", "gzip"),
    (rb"PK(\x03\x04|\x05\x06)", "zip"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard"),
    (rb"\xfd7zXZ\x00", "xz"),
    (rb"BZh[1-9]", "bzip2"),
    (rb"\x80[\x02-\x05]", "a Python pickle"),
    (rb"\x89HDF", "HDF5"),
    (rb"SQLite format 3", "SQLite"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\x00\x00\x00\x00", "an image"),
    (rb"%PDF-", "PDF"),
    (rb"\x7fELF", "a program"),
    (rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff", "UTF-16 or UTF-32"),
    (rb".{257}ustar", "tar"),
)
_ADVICE = {
    NPY: "set kind: tokens",
    JSONL: "set kind: jsonl",
    WITH_FIELD: "set kind: jsonl",
    TEXT: "set kind: text",
    ARRAY: "write each of its items on a line of its own, as jq -c '.[]' does",
    **dict.fromkeys(("Parquet", "Arrow", "HDF5", "SQLite"), "write it as JSON Lines, and set kind: jsonl"),
    **dict.fromkeys(("gzip", "zip", "Zstandard", "xz", "bzip2", "tar"), "unpack it"),
    **dict.fromkeys(("UTF-16 or UTF-32", "not UTF-8"), "convert it to UTF-8, as iconv does"),
}
_FITS = {
    "text": {TEXT, JSON, ARRAY, JSONL, WITH_FIELD, EMPTY},
    "jsonl": {JSON, JSONL, WITH_FIELD, EMPTY},  # JSON that is not JSON Lines is refused later, with its line
    "tokens": {NPY},
}


def check_content(
    source: Source, found: list[tuple[str, Path]], say: Callable[[str], None], poll: Callable[[], None]
) -> None:
    """Look into every file before any is read whole. Raises UserError, with names, when a file cannot be read or
    plainly does not fit `source.kind`. `say` gets a warning where the kind may be intended."""
    unreadable: dict[str, str] = {}
    contents: dict[str, str] = {}
    for name, path in found:
        poll()
        try:
            with open_regular(path) as file:
                contents[name] = content_of(name, file.read(_HEAD_BYTES), source.field)
        except OSError as error:
            unreadable[name] = error.strerror or str(error)
    refuse_unreadable(source, unreadable, len(found))
    wrong = {name: what for name, what in contents.items() if what not in _FITS[source.kind]}
    if wrong:
        raise UserError(_refusal(source, wrong, contents))
    if source.kind == "text":
        _look_for_jsonl(source, contents, say)


def _refusal(source: Source, wrong: dict[str, str], contents: dict[str, str]) -> str:
    named = first_three([f"{name} ({what})" for name, what in wrong.items()])
    kinds = set(wrong.values())
    if len(wrong) < len(contents):
        advice = f"remove them, or narrow `pattern` of this data.sources entry{_fitting_pattern(wrong, contents)}"
    elif len(kinds) == 1 and (known := _ADVICE.get(kinds.pop())):
        advice = known
    else:
        advice = "set path and kind of this data.sources entry"
    return (
        f"data source {source.name!r} has kind {source.kind}, but {len(wrong):,} of its {len(contents):,} files are "
        f"something else: {named}\n{advice}"
    )


def _fitting_pattern(wrong: dict[str, str], contents: dict[str, str]) -> str:
    """An example pattern that leaves all wrong files out, if the ends of names can distinguish them."""
    ends = Counter(Path(name).suffix for name in contents.keys() - wrong.keys())
    fitting = [end for end, _ in ends.most_common() if end and not any(name.endswith(end) for name in wrong)]
    return f", for example to **/*{fitting[0]}" if fitting else ""


def _look_for_jsonl(source: Source, contents: dict[str, str], say: Callable[[str], None]) -> None:
    """Warn about JSON Lines, which may be meant as text. Raise UserError where each line has the field."""
    lines = [name for name, what in contents.items() if what in (JSONL, WITH_FIELD)]
    named = first_three(lines)
    if set(contents.values()) - {EMPTY} == {WITH_FIELD}:
        raise UserError(
            f"data source {source.name!r} has kind text, but its files are JSON Lines with a text under "
            f"{source.field!r}: {named}\nset kind: jsonl, which reads that text"
        )
    if lines:
        say(
            f"warning: {len(lines):,} of {len(contents):,} files are JSON Lines, and are read as they stand: {named}; "
            "a source with kind: jsonl reads the text of one `field` of each line"
        )


def content_of(name: str, head: bytes, field: str) -> str:
    """What a file with this beginning holds, in a word or two."""
    if not head:
        return EMPTY
    for beginning, what in _BEGINNINGS:
        if re.match(beginning, head, re.DOTALL) and not _is_text(head):
            return what
    if _binary_share(head) > _BINARY_SHARE:
        return "not UTF-8" if b"\x00" not in head else "binary"
    return _json(name, head, field) or TEXT


def _is_text(head: bytes) -> bool:
    return _binary_share(head) == 0


def _binary_share(head: bytes) -> float:
    """The share of bytes that are no UTF-8 or are control characters. The last character may be cut."""
    valid = head.decode("utf-8", errors="ignore").encode()
    cut = 3 if len(head) == _HEAD_BYTES else 0
    invalid = max(len(head) - len(valid) - cut, 0)
    controls = len(valid) - len(valid.translate(None, _CONTROLS))
    return (invalid + controls) / len(head)


def _json(name: str, head: bytes, field: str) -> str | None:
    """Which kind of JSON this is, if any, by its first lines."""
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\[\s*[\[{\"]", begin):
        return ARRAY
    if not begin.startswith(b"{"):
        return None
    named_so = name.endswith((".jsonl", ".ndjson"))
    *whole, rest = head.split(b"\n")
    lines = [line for line in [*whole, *([rest] if len(head) < _HEAD_BYTES else [])] if line.strip()][:3]
    if not lines:  # the first line is longer than the bytes read
        return JSONL if named_so else JSON
    try:
        records = [json.loads(line.decode("utf-8-sig")) for line in lines]
    except (ValueError, RecursionError):
        return JSON if re.match(rb"\{\s*[\"}]", begin) else None
    if not all(isinstance(record, dict) for record in records):
        return JSON
    if all(isinstance(record.get(field), str) for record in records):
        return WITH_FIELD
    # A .json file may be one object on one line.
    return JSONL if len(records) > 1 or named_so else JSON
