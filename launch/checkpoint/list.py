"""`python -m launch checkpoint list`: the checkpoints of a run folder, their sizes, and whether they open."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.checkpoint.text import layout_text
from launch.look.text import age_text, size_text, table
from trainer.checkpoint.format.boxes import GROUPS
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.host.terminal import say
from trainer.life.entries import Entry, Kind, entries
from trainer.life.folder import RunFolder

_VERDICTS = {
    Kind.ASIDE: "bad: set aside",
    Kind.PARTIAL: "unfinished: being written, or left by a crash",
    Kind.DELETING: "half deleted",
}
_VERDICT_LENGTH = 90


@dataclass(frozen=True)
class Row:
    """One entry. All but name, kind and sizes are None when unknown. `link` is the target of a link."""

    name: str
    kind: str
    step: int | None
    link: str | None
    good: bool
    verdict: str
    bytes: int
    shared_bytes: int
    age_s: float | None = None
    layout: dict[str, Any] | None = None
    trained_share: float | None = None


def list_checkpoints(folder: Path, as_json: bool) -> int:
    """Returns the exit code: 1 when a checkpoint that should be good is not."""
    runs = {str(path): (list(map(_row, found)), _unique_bytes(found)) for path, found in shelves(folder).items()}
    if not runs:
        raise UserError(f"{folder}: neither a run folder, nor a folder of runs, nor one of checkpoints")
    if as_json:
        found = [
            {"folder": path, "bytes_on_disk": size, "checkpoints": [asdict(row) for row in rows]}
            for path, (rows, size) in runs.items()
        ]
        say(json.dumps(found, indent=1))
    else:
        for index, (path, (rows, size)) in enumerate(runs.items()):
            say("\n".join([*([""] if index else []), *_text(path, rows, size)]))
    meant = (Kind.COMMITTED.word, Kind.UNUSABLE.word)
    return 0 if all(row.good for rows, _ in runs.values() for row in rows if row.kind in meant) else 1


def shelves(folder: Path) -> dict[Path, list[Entry]]:
    """Folder -> its checkpoints: for a run, for each run in the folder, or for the folder itself. Raises UserError for
    a folder that may not be read."""
    try:
        names = sorted(os.listdir(folder))
        own = RunFolder(folder).checkpoints
        if own.is_dir():
            return {own: entries(own)}
        if found := entries(folder):
            return {folder: found}
        inner = (RunFolder(folder / name).checkpoints for name in names)
        return {path: entries(path) for path in inner if path.is_dir()}
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None


def _row(entry: Entry) -> Row:
    path, about = entry.path, (entry.path.name, entry.kind.word, entry.step, entry.target)
    if entry.fault is not None:
        return Row(*about, False, f"unusable: {entry.fault}", 0, 0)
    sizes = list(_sizes(path))
    total, shared = sum(size for _, size, _ in sizes), sum(size for _, size, links in sizes if links > 1)
    try:
        manifest = Checkpoint(path).manifest
    except (BadCheckpoint, UserError) as error:
        verdict = _VERDICTS.get(entry.kind) or "bad: " + _short(str(error), path)
        return Row(*about, False, verdict, total, shared)
    verdict = _VERDICTS.get(entry.kind, "good")
    age_s = round(max(time.time() - manifest.saved_s, 0.0), 1)
    share = trained_share(manifest)
    return Row(*about, verdict == "good", verdict, total, shared, age_s, manifest.layout, share)


def trained_share(manifest: Manifest) -> float:
    """The share of all parameters (buffers not counted) that trained when the checkpoint was written."""
    sizes = {"model": 0, "frozen": 0}
    for key, tensor in manifest.tensors.items():
        if tensor.group != "optim" and key not in manifest.buffers:
            sizes[tensor.group] += prod(manifest.shape_of(key))
    return sizes["model"] / max(sum(sizes.values()), 1)


def _sizes(path: Path) -> Iterator[tuple[tuple[int, int], int, int]]:
    """(inode, bytes, names) of each file. Reads only a checkpoint's own folders: a link may lead far away."""
    for folder in (path, *(path / group for group in GROUPS)):
        try:
            names = os.listdir(folder) if folder == path or not folder.is_symlink() else []
            found = [os.lstat(folder / name) for name in names]
        except OSError:
            continue  # no such folder, or a run deletes it just now
        for status in found:
            if not stat.S_ISDIR(status.st_mode):
                yield (status.st_dev, status.st_ino), status.st_size, status.st_nlink


def _unique_bytes(found: list[Entry]) -> int:
    """Bytes of all checkpoints together. Files with several links count once."""
    usable = [entry.path for entry in found if entry.fault is None]
    return sum({inode: size for path in usable for inode, size, _ in _sizes(path)}.values())


def _short(reason: str, path: Path) -> str:
    line = reason.splitlines()[0].replace(f"{path}/", "").replace(f"{path}: ", "")
    return line if len(line) <= _VERDICT_LENGTH else line[: _VERDICT_LENGTH - 1] + "…"


def _told(row: Row) -> str:
    """The verdict, with a remark where the name is unusual."""
    if row.kind == Kind.UNUSABLE.word:
        return f"{row.name}: {row.verdict}"
    told = f"{row.name.partition('.')[2]}: {row.verdict}" if row.kind != Kind.COMMITTED.word else row.verdict
    return told if row.link is None else f"{told}, a link to {row.link}"


def _text(path: str, rows: list[Row], unique_bytes: int) -> list[str]:
    total = sum(row.bytes for row in rows)
    saved = f", {size_text(total - unique_bytes)} of links spared" if total > unique_bytes else ""
    head = f"{path}: {len(rows)} checkpoint{'s' * (len(rows) != 1)}, {size_text(unique_bytes)} on disk{saved}"
    if not rows:
        return [head]
    header = ("step", "age", "size", "shared", "layout", "trained", "verdict")
    cells = [
        (
            "-" if row.step is None else row.step,
            "-" if row.age_s is None else age_text(row.age_s),
            size_text(row.bytes),
            size_text(row.shared_bytes),
            "-" if row.layout is None else layout_text(row.layout),
            "-" if row.trained_share is None else f"{row.trained_share:.1%}",
            _told(row),
        )
        for row in rows
    ]
    return [head, *table(header, cells, "step,age,size,shared,trained")]
