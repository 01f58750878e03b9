"""The documents of a source, one after the other, in bounded memory.

`read_file` yields the documents of one file of a source. Text (bytes) and token ids (integer arrays) both come as
`Document`s that are read in chunks.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.files import open_regular
from configs.schema.data import Source
from trainer.data.content import NUMPY
from trainer.data.listing import readable

_READ_BYTES = 128 << 10
_LINE_BYTES = 256 << 20  # a longer line of JSON is refused: memory would hold it several times
_WHOLE_BYTES = 16 << 20  # a text file up to this is read once; a larger one is hashed first, then read again
_CHUNK_TOKENS = 1 << 20


@dataclass
class Document:
    """`digest`: a hash of the whole content. `chunks` can be iterated once: bytes of text cut anywhere, or ids."""

    digest: bytes
    size_bytes: int
    chunks: Iterable[bytes] | Iterable[np.ndarray]


@dataclass
class FileReading:
    """What is known about a file after its documents were read. `read_file` fills it in."""

    digest: str = ""
    empty_documents: int = 0  # and empty files
    replaced_documents: int = 0  # no valid UTF-8, or with half a character escaped in JSON
    end_tokens: int = 0  # found in token files
    largest_id: int = 0  # found in token files
    poll: Callable[[int], None] = field(
        default=lambda _bytes: None, repr=False
    )  # called often with the bytes just read


def new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def read_file(source: Source, path: Path, end_token: int, vocab_size: int, reading: FileReading) -> Iterator[Document]:
    """The documents of one file. Raises UserError, with the place, for any fault in it. Fills `reading` at the end."""
    with readable(source, path):
        if source.kind == "text":
            yield from _read_text(source, path, reading)
        elif source.kind == "jsonl":
            yield from _read_jsonl(source, path, reading)
        else:
            yield from _read_tokens(source, path, end_token, vocab_size, reading)


def hash_file(source: Source, path: Path, poll: Callable[[int], None]) -> str:
    """Hex digest of a file's bytes, as in `FileReading.digest`."""
    digest = new_hash()
    with readable(source, path), open_regular(path) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            poll(len(chunk))
    return str(digest.hexdigest())


def _read_text(source: Source, path: Path, reading: FileReading) -> Iterator[Document]:
    size = path.stat().st_size
    if size > _WHOLE_BYTES:
        reading.digest = hash_file(source, path, reading.poll)
        check = new_hash()
        yield Document(bytes.fromhex(reading.digest), size, _chunks_of_file(source, path, check, reading))
        if check.hexdigest() != reading.digest:
            raise UserError(f"{path} changed while it was being read\nstart again when it is complete")
        return
    with open_regular(path) as file:
        content = file.read()
    digest = new_hash()
    digest.update(content)
    reading.digest = digest.hexdigest()
    reading.poll(len(content))
    if not content:
        reading.empty_documents += 1
        return
    reading.replaced_documents += not _is_utf8(content)
    yield Document(digest.digest(), len(content), [content])


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _chunks_of_file(source: Source, path: Path, check: Any, reading: FileReading) -> Iterator[bytes]:
    decoder, valid = codecs.getincrementaldecoder("utf-8")(), True
    with readable(source, path), open_regular(path) as file:
        while chunk := file.read(_READ_BYTES):
            check.update(chunk)
            try:
                decoder.decode(chunk) if valid else None
            except UnicodeDecodeError:
                valid = False
            yield chunk
    reading.replaced_documents += not (valid and not decoder.getstate()[0])


def _read_jsonl(source: Source, path: Path, reading: FileReading) -> Iterator[Document]:
    digest, number = new_hash(), 0
    with open_regular(path) as file:
        while line := file.readline(_LINE_BYTES + 1):
            number += 1
            if len(line) > _LINE_BYTES:
                raise UserError(f"{path}:{number}: a line of more than {_LINE_BYTES >> 20} MiB\ncut it into documents")
            digest.update(line)
            reading.poll(len(line))
            if not line.strip():
                continue
            text = _field(source, f"{path}:{number}", line)
            content = text.encode("utf-8", errors="replace")
            if not content:
                reading.empty_documents += 1
                continue
            # JSON may escape half a character ("\ud800"). It is no text, so "?" replaces it.
            reading.replaced_documents += any("\ud800" <= c <= "\udfff" for c in text) if b"?" in content else 0
            own = new_hash()
            own.update(content)
            yield Document(own.digest(), len(content), [content])
    reading.empty_documents += not number
    reading.digest = digest.hexdigest()


def _field(source: Source, place: str, line: bytes) -> str:
    """The document in a JSONL line. UserErrors begin with file and line."""
    try:
        record = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=tuple
        )  # a dict would hide a key that comes twice
    except (ValueError, RecursionError) as e:
        raise UserError(f"{place}: not a line of JSON (data source {source.name!r}): {e}") from e
    if not isinstance(record, tuple):
        raise UserError(f"{place}: an object was expected, not {_kind(record)} (data source {source.name!r})")
    keys = [key for key, _ in record]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{place}: the key {twice!r} stands twice (data source {source.name!r})\nremove one of them")
    if source.field not in keys:
        shown = ", ".join(keys[:8]) or "none"
        raise UserError(
            f"{place}: no key {source.field!r} (data source {source.name!r}); its keys: {shown}\n"
            "set `field` of this data.sources entry"
        )
    text = dict(record)[source.field]
    if not isinstance(text, str):
        raise UserError(
            f"{place}: {source.field!r} is {_kind(text)}, a string was expected (data source {source.name!r})"
        )
    return text


def _kind(value: Any) -> str:
    """The type of a value that `_field` read, in JSON's words."""
    names = {tuple: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def _read_tokens(
    source: Source, path: Path, end_token: int, vocab_size: int, reading: FileReading
) -> Iterator[Document]:
    ids = _map_tokens(source, path)
    reading.digest = hash_file(source, path, reading.poll)
    begin = 0
    reading.empty_documents += not len(ids)
    for offset in range(0, len(ids), _CHUNK_TOKENS):
        chunk = ids[offset : offset + _CHUNK_TOKENS]
        _check_ids(source, path, chunk, offset, vocab_size)
        reading.largest_id = max(reading.largest_id, int(chunk.max()))
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
    """The mapped array of a file. numpy's messages about a bad file are about numpy itself, so ours replace them."""
    place = f"data source {source.name!r}: {path}"
    with open_regular(path) as file:
        if file.read(len(NUMPY)) != NUMPY:
            raise UserError(f"{place} is not a .npy file of token ids\nwrite the ids with numpy.save")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, TypeError, EOFError, SyntaxError) as e:
        raise UserError(
            f"{place} is not a .npy file of token ids: it is cut short, damaged, or holds Python objects\n"
            "write the ids with numpy.save"
        ) from e
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(
            f"{place} holds {ids.dtype} of shape {ids.shape}, a one-dimensional array of integers was expected"
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
    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(ids), _CHUNK_TOKENS):
            yield ids[start : start + _CHUNK_TOKENS]

    digest = new_hash()
    for chunk in chunks():
        # One width for all, so that a document has the same digest in uint16 and in int64.
        digest.update(np.ascontiguousarray(chunk, dtype="<u4"))
    return Document(digest.digest(), ids.nbytes, chunks())
