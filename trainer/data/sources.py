"""The documents of a source, one after the other, in bounded memory.

`list_files` says what a source consists of; `read_file` yields the documents of one of its files. Both kinds of
content, text (bytes) and token ids (integer arrays), come as `Document`s that are read in pieces.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.schema import Source

STDLIB = "python:stdlib"
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

PIECE_BYTES = 128 << 10  # text goes to the tokenizer in pieces of at most this; small: stop requests wait for one
_WHOLE_BYTES = 16 << 20  # a text file up to this is read once; a larger one is hashed first, then read again
_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class FileStat:
    """What tells cheaply that a file may have changed."""

    size_bytes: int
    mtime_ns: int

    @staticmethod
    def of(source: Source, path: Path) -> FileStat:
        with _readable(source, path):
            stat = path.stat()
        return FileStat(stat.st_size, stat.st_mtime_ns)


@dataclass
class Document:
    """`digest` is a hash of the whole content; `pieces` can be iterated once: bytes of text, or arrays of ids."""

    digest: bytes
    size_bytes: int
    pieces: Iterable[bytes] | Iterable[np.ndarray]


@dataclass
class FileReading:
    """What is known about a file after its documents were read: filled in by `read_file`."""

    digest: str = ""
    empty_documents: int = 0
    replaced_documents: int = 0  # not valid UTF-8
    end_tokens: int = 0  # found in token files
    poll: Callable[[int], None] = field(
        default=lambda _bytes: None, repr=False
    )  # called often with the bytes just read


def new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def source_root(source: Source) -> Path:
    """Absolute path of a source. UserError when it does not exist."""
    if source.path == STDLIB:
        if source.kind != "text":
            raise UserError(f"data source {source.name!r}: path {STDLIB} is text; set its kind to text")
        return Path(sysconfig.get_path("stdlib")).resolve()
    root = Path(source.path).expanduser().resolve()
    if not root.exists():
        raise UserError(f"data source {source.name!r}: {root} does not exist\nset the path of this data.sources entry")
    return root


def list_files(source: Source, poll: Callable[[], None]) -> list[tuple[str, Path]]:
    """(relative path, path) of every file, sorted by relative path. Hidden files and folders are left out.

    UserError when there is none.
    """
    return sorted(_files(source, poll))


def check_source(source: Source) -> None:
    """Raise UserError when there is nothing to read. Looks no further than to the first file."""
    next(_files(source, lambda: None))


def _files(source: Source, poll: Callable[[], None]) -> Iterator[tuple[str, Path]]:
    """At least one, or UserError; in the order in which folders are walked."""
    root = source_root(source)
    if root.is_file():
        yield root.name, root
        return
    stdlib = source.path == STDLIB
    pattern = "**/*.py" if stdlib and source.pattern == "**/*" else source.pattern
    try:
        wanted = _glob(pattern)
    except re.error as e:
        raise UserError(f"data source {source.name!r}: {pattern!r} is not a pattern: {e}") from e
    empty = True
    for name in _walk(source, root, stdlib, poll):
        if wanted.fullmatch(name):
            empty = False
            yield name, root / name
    if empty:
        raise UserError(
            f"data source {source.name!r} is empty: no file in {root} matches {pattern!r}\n"
            "set path or pattern of this data.sources entry"
        )


def _walk(source: Source, root: Path, stdlib: bool, poll: Callable[[], None]) -> Iterator[str]:
    """Relative paths of all files, links followed. (Path.glob skips linked and unreadable folders without a word.)"""
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        poll()
        with _readable(source, root / folder):
            stat = (root / folder).stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue  # a link back: each folder counts once
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda e: e.name, reverse=True)
        for entry in entries:
            if entry.name.startswith(".") or (stdlib and entry.name in _STDLIB_LEFT_OUT):
                continue
            if entry.is_dir():
                waiting.append(f"{folder}{entry.name}/")
            elif entry.is_file():
                yield f"{folder}{entry.name}"


def _glob(pattern: str) -> re.Pattern[str]:
    """A glob over relative paths: `*` and `?` stay within a name, `**/` is any number of folders."""
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^]/]+\])", pattern)
    return re.compile("".join(special.get(p) or _set_or_text(p) for p in parts), re.DOTALL)


def _set_or_text(part: str) -> str:
    if len(part) > 2 and part[0] == "[" and part[-1] == "]" and part != "[!]":
        inside = re.escape(part[1:-1]).replace(r"\-", "-")
        return f"[^{inside[1:]}]" if inside[0] == "!" else f"[{inside}]"
    return re.escape(part)


def read_file(source: Source, path: Path, end_token: int, vocab_size: int, reading: FileReading) -> Iterator[Document]:
    """The documents of one file. UserError for whatever is wrong inside, with the place. Fills `reading` at the end."""
    with _readable(source, path):
        if source.kind == "text":
            yield from _read_text(source, path, reading)
        elif source.kind == "jsonl":
            yield from _read_jsonl(source, path, reading)
        else:
            yield from _read_tokens(source, path, end_token, vocab_size, reading)


@contextmanager
def _readable(source: Source, path: Path) -> Iterator[None]:
    """Turns failures to read a file into UserErrors. Around a generator's body it sees nothing of its consumer."""
    try:
        yield
    except OSError as e:
        raise UserError(f"data source {source.name!r}: cannot read {path}: {e.strerror or e}") from e


def hash_file(source: Source, path: Path, poll: Callable[[int], None]) -> str:
    """Hex digest of a file's bytes, as in `FileReading.digest`."""
    digest = new_hash()
    with _readable(source, path), path.open("rb") as file:
        while chunk := file.read(PIECE_BYTES):
            digest.update(chunk)
            poll(len(chunk))
    return str(digest.hexdigest())


def _read_text(source: Source, path: Path, reading: FileReading) -> Iterator[Document]:
    size = path.stat().st_size
    if size > _WHOLE_BYTES:
        reading.digest = hash_file(source, path, reading.poll)
        check = new_hash()
        yield Document(bytes.fromhex(reading.digest), size, _pieces_of_file(source, path, check, reading))
        if check.hexdigest() != reading.digest:
            raise UserError(f"{path} changed while it was being read\nstart again when it is complete")
        return
    content = path.read_bytes()
    digest = new_hash()
    digest.update(content)
    reading.digest = digest.hexdigest()
    reading.poll(len(content))
    if not content:
        reading.empty_documents += 1
        return
    reading.replaced_documents += not _is_utf8(content)
    yield Document(digest.digest(), len(content), _pieces(content))


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _pieces(content: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(content):
        end = start + _cut(content[start : start + PIECE_BYTES + 1])
        yield content[start:end]
        start = end


def _pieces_of_file(source: Source, path: Path, check: Any, reading: FileReading) -> Iterator[bytes]:
    rest, valid = b"", True
    with _readable(source, path), path.open("rb") as file:
        while chunk := file.read(PIECE_BYTES):
            check.update(chunk)
            rest += chunk
            while len(rest) > PIECE_BYTES:
                end = _cut(rest)
                valid = valid and _is_utf8(rest[:end])
                yield rest[:end]
                rest = rest[end:]
    reading.replaced_documents += not (valid and _is_utf8(rest))
    if rest:
        yield rest


def _cut(text: bytes) -> int:
    """Where to end a piece: after a line, else before a blank, else between characters; all of it when it is short.

    Tokenizers split before a line's first letter and before a word's blank anyway, so these cuts leave the ids as
    they would have been. Runs of blanks are tokens of their own and stay whole.
    """
    if len(text) <= PIECE_BYTES:
        return len(text)
    half = PIECE_BYTES // 2
    for blank, shift in ((b"\n", 1), (b" ", 0)):
        at = text.rfind(blank, half, PIECE_BYTES)
        while at >= 0:
            neighbour = at + 1 if shift else at - 1
            if not text[neighbour : neighbour + 1].isspace():
                return at + shift
            at = text.rfind(blank, half, at)
    end = PIECE_BYTES
    while end > half and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _read_jsonl(source: Source, path: Path, reading: FileReading) -> Iterator[Document]:
    digest = new_hash()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            reading.poll(len(line))
            if not line.strip():
                continue
            # Escaped lone surrogates ("\ud800") are valid JSON but no text.
            content = _field(source, f"{path}:{number}", line).encode("utf-8", errors="replace")
            if not content:
                reading.empty_documents += 1
                continue
            own = new_hash()
            own.update(content)
            yield Document(own.digest(), len(content), _pieces(content))
    reading.digest = digest.hexdigest()


def _field(source: Source, place: str, line: bytes) -> str:
    """The document in a JSONL line; UserErrors begin with file and line."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{place}: not a line of JSON (data source {source.name!r}): {e}") from e
    if not isinstance(record, dict):
        raise UserError(f"{place}: an object was expected, not {type(record).__name__} (data source {source.name!r})")
    if source.field not in record:
        keys = ", ".join(list(record)[:8]) or "none"
        raise UserError(
            f"{place}: no key {source.field!r} (data source {source.name!r}); its keys: {keys}\n"
            "set `field` of this data.sources entry"
        )
    text = record[source.field]
    if not isinstance(text, str):
        raise UserError(
            f"{place}: {source.field!r} is {type(text).__name__}, a string was expected (data source {source.name!r})"
        )
    return text


def _read_tokens(
    source: Source, path: Path, end_token: int, vocab_size: int, reading: FileReading
) -> Iterator[Document]:
    ids = _map_tokens(source, path)
    reading.digest = hash_file(source, path, reading.poll)
    begin = 0
    for offset in range(0, len(ids), _CHUNK_TOKENS):
        chunk = ids[offset : offset + _CHUNK_TOKENS]
        _check_ids(source, path, chunk, offset, vocab_size)
        for end in (np.flatnonzero(chunk == end_token) + offset).tolist():
            if end == begin:
                reading.empty_documents += 1
            else:
                yield _token_document(ids[begin:end])
            begin = end + 1
            reading.end_tokens += 1
        reading.poll(0)
    if begin < len(ids):
        yield _token_document(ids[begin:])


def _map_tokens(source: Source, path: Path) -> np.ndarray:
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(ids, np.ndarray):
            raise TypeError("it is an archive")
    except (ValueError, TypeError, EOFError) as e:
        raise UserError(
            f"data source {source.name!r}: {path} is not a .npy file of token ids: {e}\n"
            "narrow `pattern` of this data.sources entry, for example to **/*.npy"
        ) from e
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(
            f"data source {source.name!r}: {path} holds {ids.dtype} of shape {ids.shape}, "
            "a one-dimensional array of integers was expected"
        )
    return ids


def _check_ids(source: Source, path: Path, chunk: np.ndarray, offset: int, vocab_size: int) -> None:
    if chunk.min() < 0 or chunk.max() >= vocab_size:
        at = int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
        raise UserError(
            f"data source {source.name!r}: {path}: token id {chunk[at]} at position {offset + at} is beyond the "
            f"vocabulary\nmodel.vocab_size is {vocab_size}: raise it, or tokenise with the tokenizer of this model"
        )


def _token_document(ids: np.ndarray) -> Document:
    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, len(ids), _CHUNK_TOKENS):
            yield ids[start : start + _CHUNK_TOKENS]

    digest = new_hash()
    for piece in pieces():
        # One width for all: the same document in uint16 and in int64 is the same document.
        digest.update(np.ascontiguousarray(piece, dtype="<u4"))
    return Document(digest.digest(), ids.nbytes, pieces())
