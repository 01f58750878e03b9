"""Tokenise every source once into the cache, or find that this was done before.

`<cache>/<source>-<key>-<content>/` holds one source:

    train.npy, validation.npy   all tokens one after the other, every document followed by the end token
    <split>.documents.npy       where each document starts
    meta.json                   how it was prepared
    files.json                  of each file its size, time and hash; files-<path>.json: of a copy at another path

The key covers the settings by which the source is read. The content part is the fingerprint of the documents. So a
changed source gets a new folder, and a run that still maps the old folder is not disturbed. `<cache>/run-<hash>.json`
names the folders of one config, and `Prepared.open` reads it on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from configs.config import Config
from configs.errors import UserError
from configs.schema.data import Source
from trainer.data import files
from trainer.data.cached import CUTS, FILES, FORMAT, META, check_largest_id, find_prepared, settings_of
from trainer.data.content import check_content
from trainer.data.cuts import ANYWHERE, PIECE_BYTES, pieces
from trainer.data.enough import check_enough
from trainer.data.listing import FileStat, list_files, readable, stat_files
from trainer.data.open_tokens import open_tokens
from trainer.data.order import quotas
from trainer.data.preparing import Progress, cache_errors, key_of
from trainer.data.sources import Document, FileReading, new_hash, read_file
from trainer.data.tokenizer import Tokenizer, load_tokenizer, words_of

_BATCH_BYTES = 128 << 10  # text tokenised in one call; small, so that a stop request is noticed soon
_LARGE_PIECE_BYTES = 1 << 20  # a piece of this much text gets a progress line


def prepare(
    config: Config,
    cache: Path,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
    began_with: Mapping[str, str] | None = None,
) -> Path:
    """Make every source of a config ready and return what `Prepared.open` takes. For one process, rank 0.

    say: takes progress lines, at most one a second and source. should_stop: asked several times a second. began_with:
    the fingerprints in the run's checkpoint. A source that was prepared for them in an older way is used unchanged.
    Raises UserError when the data are wrong, Interrupted when `should_stop` is true.
    """
    tokenizer = load_tokenizer(config.data, config.most_words)
    quotas([s.weight for s in config.data.sources], [s.name for s in config.data.sources])  # refused before the work
    with cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(cache)
        # List all sources before the work on any: a dead link in the last is reported before the first is tokenised.
        listed = {s.name: list_files(s, Progress(s.name, say, should_stop).poll) for s in config.data.sources}
        folders = [
            _source_folder(
                *(config, s, listed[s.name], tokenizer, cache),
                *(Progress(s.name, say, should_stop), (began_with or {}).get(s.name)),
            )
            for s in config.data.sources
        ]
        index = {
            "format": FORMAT,
            "tokenizer": {
                "size": tokenizer.size,
                "end_token": tokenizer.end_token,
                "fingerprint": tokenizer.fingerprint,
            },
            "sources": [
                {"name": source.name, "weight": source.weight, "folder": folder.name}
                for source, folder in zip(config.data.sources, folders, strict=True)
            ],
        }
        path = cache / f"run-{key_of(index)}.json"
        if not path.exists():
            files.write_json(path, index)
    check_enough(open_tokens(path, config, patience_s=0.0), config)
    return path


def _source_folder(
    config: Config,
    source: Source,
    found: list[tuple[str, Path]],
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress,
    began_with: str | None,
) -> Path:
    """The folder of a prepared source with the present content of its files `found`. Made if there is none."""
    progress.poll()
    settings = settings_of(config, source, tokenizer)
    name = f"{source.name}-{key_of(settings)}"
    stats = stat_files(source, found, progress.poll)
    prepared = find_prepared(cache, source, settings, tokenizer.places, found, stats, began_with, progress.poll)
    if prepared is not None:
        if source.kind == "tokens":
            check_largest_id(prepared, source, words_of(config, tokenizer), progress.poll)
        return prepared
    check_content(source, found, progress.say, progress.poll)
    with files.temporary_folder(cache) as temporary:
        fingerprint = _tokenise(config, source, settings, tokenizer, found, temporary, progress)
        final = cache / f"{name}-{fingerprint[:16]}"
        if not files.publish(temporary, final):
            # Another start was faster, or other files held the same documents: record the present files.
            for file in (FILES, META):
                (temporary / file).replace(final / file)
    progress.say(f"prepared {progress.summary()}")
    return final


class _SplitWriter:
    """One split's tokens and document starts."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.tokens = files.ArrayWriter(folder / f"{split}.npy", dtype)
        self.documents = files.ArrayWriter(folder / f"{split}.documents.npy", np.dtype(np.int64))
        self._starts: list[int] = []

    def begin(self) -> None:
        self._starts.append(self.tokens.count)
        if len(self._starts) >= 1 << 16:
            self._flush()

    def _flush(self) -> None:
        self.documents.add(np.array(self._starts, dtype=np.int64))
        self._starts.clear()

    def close(self) -> dict[str, int]:
        self._flush()
        self.tokens.close()
        self.documents.close()
        return {"tokens": self.tokens.count, "documents": self.documents.count}

    def abandon(self) -> None:
        self.tokens.abandon()
        self.documents.abandon()


class _SourceWriter:
    """Sends documents to their split by the hash of their content, tokenising text in batches."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], tokenizer: Tokenizer, say: Callable[[str], None]
    ) -> None:
        dtype = np.dtype(settings["dtype"])
        self.train, self.validation = _SplitWriter(folder, "train", dtype), _SplitWriter(folder, "validation", dtype)
        self.fingerprint = new_hash()
        self.fingerprint.update(json.dumps([settings[k] for k in sorted(settings) if k != "source"]).encode())
        self._tokenizer, self._say, self._said_large = tokenizer, say, False
        self._is_text = settings["source"]["kind"] != "tokens"
        self._end = np.array([tokenizer.end_token], dtype=dtype)
        self._threshold = int(settings["validation_fraction"] * 2**64)
        self._waiting: list[tuple[_SplitWriter, bytes | None]] = []  # None: the document ends
        self._waiting_bytes = 0

    def add(self, document: Document, poll: Callable[[], None]) -> None:
        self.fingerprint.update(document.digest)
        # By content: copies of a document get the same side, wherever they are and whatever is added later.
        held_out = int.from_bytes(document.digest[:8], "little") < self._threshold
        split = self.validation if held_out else self.train
        self._waiting.append((split, b""))
        if self._is_text:
            self._add_text(split, document, poll)
        else:
            self.flush()
            for ids in document.chunks:
                split.tokens.add(np.asarray(ids))
                poll()
        self._waiting.append((split, None))

    def _add_text(self, split: _SplitWriter, document: Document, poll: Callable[[], None]) -> None:
        if document.size_bytes > PIECE_BYTES and self._tokenizer.places is not ANYWHERE:
            self.fingerprint.update(b"cuts %d" % CUTS)  # its ids may differ from those of the older way
        for piece in pieces(cast(Iterable[bytes], document.chunks), self._tokenizer.places):
            self._largest(len(piece))
            self._waiting.append((split, piece))
            self._waiting_bytes += len(piece)
            if self._waiting_bytes >= _BATCH_BYTES:
                self.flush()
            poll()

    def _largest(self, size_bytes: int) -> None:
        if size_bytes >= _LARGE_PIECE_BYTES and not self._said_large:
            self._said_large = True
            self._say(
                f"a text of {size_bytes / 1e6:,.1f} MB is tokenised in one go, which needs memory and time: "
                "data.tokenizer gives other ids if it is cut"
            )

    def flush(self) -> None:
        """Tokenise and write the waiting texts. b"" begins a document, None ends it."""
        encoded = iter(self._tokenizer.encode([piece for _, piece in self._waiting if piece]))
        for split, piece in self._waiting:
            if piece is None:
                split.tokens.add(self._end)
            elif piece == b"":
                split.begin()
            else:
                split.tokens.add(next(encoded))
        self._waiting.clear()
        self._waiting_bytes = 0

    def close(self) -> dict[str, Any]:
        self.flush()
        return {"train": self.train.close(), "validation": self.validation.close()}

    def abandon(self) -> None:
        self.train.abandon()
        self.validation.abandon()


def _tokenise(
    config: Config,
    source: Source,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    found: list[tuple[str, Path]],
    folder: Path,
    progress: Progress,
) -> str:
    """Write a whole source into a folder; returns the fingerprint of its content."""
    writer = _SourceWriter(folder, settings, tokenizer, progress.say)
    known: dict[str, list[Any]] = {}
    reading = FileReading(poll=progress.poll)
    try:
        for name, path in found:
            # Before reading, so that a later change of the file is found at the next start.
            with readable(source, path):
                stat = FileStat.of(path)
            for document in read_file(source, path, tokenizer.end_token, words_of(config, tokenizer), reading):
                writer.add(document, progress.poll)
                progress.count += 1
            known[name] = [stat.size_bytes, stat.mtime_ns, reading.digest]
        splits = writer.close()
    finally:
        writer.abandon()
    fingerprint = str(writer.fingerprint.hexdigest())
    meta = {
        **settings,
        "fingerprint": fingerprint,
        "splits": splits,
        "cuts": CUTS,
        "largest_id": reading.largest_id,
        "empty_documents": reading.empty_documents,
        "replaced_documents": reading.replaced_documents,
    }
    _refuse_empty(source, meta)
    if source.kind == "tokens" and not reading.end_tokens:
        progress.say(
            f"warning: no end token ({tokenizer.end_token}) in its files, so each file is one document; "
            "is it the one they were made with (data.end_token, data.tokenizer)?"
        )
    files.write_json(folder / FILES, known)
    files.write_json(folder / META, meta)
    return fingerprint


def _refuse_empty(source: Source, meta: dict[str, Any]) -> None:
    if not any(split["documents"] for split in meta["splits"].values()):
        raise UserError(
            f"data source {source.name!r} is empty: its files hold no document "
            f"({meta['empty_documents']:,} empty ones)\nset path or pattern of this data.sources entry"
        )
