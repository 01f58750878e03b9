"""Which folder of the cache already holds the present content of a source's files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.config import Config
from configs.errors import UserError
from configs.schema.data import Source
from trainer.data import files
from trainer.data.cuts import ANYWHERE, PIECE_BYTES
from trainer.data.listing import FileStat, source_root
from trainer.data.sources import hash_file
from trainer.data.tokenizer import Tokenizer, words_of

FORMAT = 1
CUTS = 2  # the version of how long texts are cut: see `_is_cut_as_now`
FILES, META = "files.json", "meta.json"
_NOT_OF_DOCUMENTS = {"weight", "split", "labels"}  # not in META: folders from before these keys must still match
_CHUNK_TOKENS = 1 << 20

Found = list[tuple[str, Path]]
Poll = Callable[[int], None]  # called often with the number of bytes just read


def settings_of(config: Config, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """All settings that decide what a prepared source holds, without the files themselves."""
    size = words_of(config, tokenizer) if source.kind == "tokens" else tokenizer.size
    return {
        "format": FORMAT,
        "source": {**source.model_dump(exclude=_NOT_OF_DOCUMENTS), "path": str(source_root(source))},
        "tokenizer": "ids" if source.kind == "tokens" else tokenizer.fingerprint,
        "end_token": tokenizer.end_token,
        "validation_fraction": config.data.validation_fraction,
        "dtype": "<u2" if size <= 1 << 16 else "<u4",
    }


def find_prepared(
    cache: Path,
    source: Source,
    settings: dict[str, Any],
    places: re.Pattern[bytes],
    found: Found,
    stats: dict[str, FileStat],
    began_with: str | None,
    poll: Poll,
) -> Path | None:
    """The prepared folder to use, if there is one. began_with: the fingerprint in the run's checkpoint. A folder that
    this run prepared in an older way is used for this run alone."""

    def is_own(folder: Path) -> bool:
        return began_with is not None and folder.name.endswith(f"-{began_with[:16]}")

    alike = alike_folders(cache, source, settings)
    for folder in sorted(alike, key=lambda folder: not is_own(folder)):
        usable = is_own(folder) or _is_cut_as_now(alike[folder], source, places, stats)
        if usable and still_holds(folder, alike[folder], source, dict(found), stats, poll):
            return folder
    return None


def alike_folders(cache: Path, source: Source, settings: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Folders prepared under these settings, with their META, wherever the source was at that time. Folders that know
    its present path come first."""
    path, found = settings["source"]["path"], []
    for folder in sorted(cache.glob(f"{source.name}-*")):
        try:
            meta = files.read_json(folder / META)
            then, now = ({**m["source"], "path": "", "pattern": ""} for m in (meta, settings))
            if then == now and all(meta[key] == settings[key] for key in settings if key != "source"):
                found.append((not (folder / _noted(path, meta["source"]["path"])).exists(), folder, meta))
        except (OSError, ValueError, LookupError, TypeError):
            continue  # another start just removed it, or it is not ours
    return {folder: meta for _, folder, meta in sorted(found, key=lambda one: one[:2])}


def _is_cut_as_now(meta: dict[str, Any], source: Source, places: re.Pattern[bytes], stats: dict[str, FileStat]) -> bool:
    """Whether a folder holds what would be prepared today. An older version cut long texts at places that could change
    ids, and its folders do not record how they were cut."""
    if source.kind == "tokens" or places is ANYWHERE or all(s.size_bytes <= PIECE_BYTES for s in stats.values()):
        return True
    return bool(meta.get("cuts") == CUTS)


def still_holds(
    folder: Path,
    meta: dict[str, Any],
    source: Source,
    found: dict[str, Path],
    stats: dict[str, FileStat],
    poll: Poll,
) -> bool:
    """Whether a prepared folder holds these files. Sizes and times count only if they were recorded for this very path:
    other files may have the same and differ in content. All other files are read and compared by their hash."""
    noted = folder / _noted(str(source_root(source)), meta["source"]["path"])
    try:
        known: dict[str, list[Any]] = files.read_json(folder / FILES)
        seen: dict[str, list[Any]] = files.read_json(noted) if noted.exists() else {}
    except (OSError, ValueError):
        return False
    if known.keys() != stats.keys() or any(stat.size_bytes != known[name][0] for name, stat in stats.items()):
        return False
    now = {name: [stat.size_bytes, stat.mtime_ns, known[name][2]] for name, stat in stats.items()}
    touched = [name for name in now if now[name] != seen.get(name)]
    if any(hash_file(source, found[name], poll) != known[name][2] for name in touched):
        return False
    if touched:
        with as_far_as_writable():
            files.write_json(noted, now)
    return True


def _noted(path: str, prepared_from: str) -> str:
    """The file with the sizes and times of a source at `path`. There is one for each path. Otherwise two people with
    copies of one source would overwrite each other's times, and read all of it at each start."""
    if path == prepared_from:
        return FILES
    return f"files-{hashlib.blake2b(path.encode(errors='surrogateescape'), digest_size=8).hexdigest()}.json"


@contextlib.contextmanager
def as_far_as_writable() -> Iterator[None]:
    """Ignore the error when another user's cache, or a read-only one, cannot be written: the work is done again."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def check_largest_id(folder: Path, source: Source, vocab_size: int, poll: Poll) -> None:
    """Raise UserError when prepared ids are beyond the vocabulary. They were checked against the vocabulary of the
    model for which they were prepared."""
    meta = files.read_json(folder / META)
    if "largest_id" not in meta:  # an older Muster prepared it: find the id once
        arrays = [files.map_array(folder / f"{split}.npy") for split in meta["splits"]]
        chunks = (a[i : i + _CHUNK_TOKENS] for a in arrays for i in range(0, len(a), _CHUNK_TOKENS))
        meta["largest_id"] = 0
        for chunk in chunks:
            meta["largest_id"] = max(meta["largest_id"], int(chunk.max()))
            poll(chunk.nbytes)
        with as_far_as_writable():
            files.write_json(folder / META, meta)
    if meta["largest_id"] >= vocab_size:
        raise UserError(
            f"data source {source.name!r} holds token id {meta['largest_id']}, beyond the vocabulary\n"
            f"model.vocab_size is {vocab_size}: raise it, or tokenise with the tokenizer of this model"
        )
