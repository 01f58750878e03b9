"""Which folder of the cache already holds what the files of a source hold now."""

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
from trainer.data.tokenizer import Tokenizer

FORMAT = 1
CUTS = 2  # the way long texts are cut: see `_is_cut_as_now`
FILES, META = "files.json", "meta.json"
_NOT_OF_DOCUMENTS = {"weight", "split", "labels"}  # and so not in META: what was prepared before they came still serves
_CHUNK_TOKENS = 1 << 20

Found = list[tuple[str, Path]]
Poll = Callable[[int], None]  # called often with the bytes just read


def settings_of(config: Config, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything but the files themselves that decides what a prepared source holds."""
    size = config.words if source.kind == "tokens" else tokenizer.size
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
    """The folder that serves, if there is one. began_with: the fingerprint that the run's checkpoint has; what that run
    prepared in an older way serves it, and no other."""

    def is_own(folder: Path) -> bool:
        return began_with is not None and folder.name.endswith(f"-{began_with[:16]}")

    alike = alike_folders(cache, source, settings)
    for folder in sorted(alike, key=lambda folder: not is_own(folder)):
        usable = is_own(folder) or _is_cut_as_now(alike[folder], source, places, stats)
        if usable and still_holds(folder, alike[folder], source, dict(found), stats, poll):
            return folder
    return None


def alike_folders(cache: Path, source: Source, settings: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Folders prepared under these settings, and their META, wherever the files lay then: those that know this path
    first."""
    path, found = settings["source"]["path"], []
    for folder in sorted(cache.glob(f"{source.name}-*")):
        try:
            meta = files.read_json(folder / META)
            then, now = ({**m["source"], "path": "", "pattern": ""} for m in (meta, settings))
            if then == now and all(meta[key] == settings[key] for key in settings if key != "source"):
                found.append((not (folder / _noted(path, meta["source"]["path"])).exists(), folder, meta))
        except (OSError, ValueError, LookupError, TypeError):
            continue  # another start removes it, or it is none of ours
    return {folder: meta for _, folder, meta in sorted(found, key=lambda one: one[:2])}


def _is_cut_as_now(meta: dict[str, Any], source: Source, places: re.Pattern[bytes], stats: dict[str, FileStat]) -> bool:
    """Whether a folder holds what would be prepared today. Long texts were once cut where that could change ids; such
    folders do not say how they were cut."""
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
    """Whether a prepared folder holds these files. Sizes and times are trusted only where they were noted for this very
    path: files elsewhere may have the same and hold something else. All others are read and compared by content."""
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
    """The file with the sizes and times of a source at `path`. A file for each path: two people with copies of one
    source would overwrite each other's times, and read everything again at each start."""
    if path == prepared_from:
        return FILES
    return f"files-{hashlib.blake2b(path.encode(errors='surrogateescape'), digest_size=8).hexdigest()}.json"


@contextlib.contextmanager
def as_far_as_writable() -> Iterator[None]:
    """Someone else's cache may be closed to us, or mounted read-only: what is not written is looked for again."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def check_largest_id(folder: Path, source: Source, vocab_size: int, poll: Poll) -> None:
    """UserError when ids that were there already are beyond the vocabulary: they were checked against that of the model
    for which they were prepared."""
    meta = files.read_json(folder / META)
    if "largest_id" not in meta:  # prepared by an older Muster: looked for once
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
