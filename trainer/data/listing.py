"""Which files a source consists of. Files that cannot be read are named before any work; none is left out silently."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema.data import Source

STDLIB = "python:stdlib"
DIGITS, DIABETES = "python:digits", "python:diabetes"
_IN_PACKAGES = {DIGITS: ("idx", "images"), DIABETES: ("csv", "a table")}  # data without files: kind, and a word for it
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class FileStat:
    """Values that change when a file changes, cheap to read."""

    size_bytes: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> FileStat:
        stat = path.stat()
        return FileStat(stat.st_size, stat.st_mtime_ns)


@contextmanager
def readable(source: Source, path: Path) -> Iterator[None]:
    """Turn failures to read a file into UserErrors. Inside a generator it sees no errors of its consumer."""
    try:
        yield
    except OSError as e:
        raise UserError(f"data source {source.name!r}: cannot read {path}: {e.strerror or e}") from e


def first_three(names: list[str]) -> str:
    """The first three names; `...` stands for the rest."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def refuse_unreadable(source: Source, wrong: dict[str, str], count: int) -> None:
    """Raise UserError when any file of a source cannot be read. wrong: name -> reason; count: of all its files."""
    if wrong:
        named = first_three([f"{name} ({reason})" for name, reason in wrong.items()])
        raise UserError(
            f"data source {source.name!r}: {len(wrong):,} of its {count:,} files cannot be read: {named}\n"
            "restore or remove them, or narrow `pattern` of this data.sources entry"
        )


def stat_files(source: Source, found: list[tuple[str, Path]], poll: Callable[[], None]) -> dict[str, FileStat]:
    """Size and time of each file. Raises UserError when one of them is gone, or may not be read."""
    stats, gone = {}, {}
    for name, path in found:
        poll()
        try:
            stats[name] = FileStat.of(path)
        except OSError as error:
            gone[name] = error.strerror or str(error)
    refuse_unreadable(source, gone, len(found))
    return stats


def is_in_package(source: Source) -> bool:
    """Whether a Python package holds the data of this source. Such a source has no files."""
    return source.path in _IN_PACKAGES


def check_installed(source: Source) -> None:
    """Raise UserError when the package that this source needs is missing."""
    if is_in_package(source):
        module, install = "sklearn", "pip install scikit-learn"
    elif source.kind == "parquet":
        module, install = "pyarrow", "pip install 'muster[tables]'"
    else:
        return
    if importlib.util.find_spec(module) is None:
        what = f"path {source.path}" if is_in_package(source) else "kind parquet"
        raise UserError(f"data source {source.name!r}: {what} needs {module}, which is not installed\n{install}")


def source_root(source: Source) -> Path:
    """Absolute path of a source; data of a package keeps its name. Raises UserError when there is no file or folder."""
    if is_in_package(source):
        kind, what = _IN_PACKAGES[source.path]
        if source.kind != kind:
            raise UserError(f"data source {source.name!r}: path {source.path} is {what}; set its kind to {kind}")
        return Path(source.path)
    if source.path == STDLIB:
        if source.kind != "text":
            raise UserError(f"data source {source.name!r}: path {STDLIB} is text; set its kind to text")
        return Path(sysconfig.get_path("stdlib")).resolve()
    path = Path(source.path)
    with readable(source, path):
        root = Path(os.path.realpath(path))
        known = root.is_file() or root.is_dir()
        if not known and not root.exists():
            led = f" (a link to {root})" if path.is_symlink() else ""
            raise UserError(
                f"data source {source.name!r}: {path.absolute()}{led} does not exist\n"
                "set the path of this data.sources entry"
            )
    if not known:
        raise UserError(f"data source {source.name!r}: {path} is neither a file nor a folder")
    return root


def list_files(source: Source, poll: Callable[[], None]) -> list[tuple[str, Path]]:
    """(relative path, path) of every file, sorted by relative path, without hidden files and folders. Empty for data of
    a package.

    Raises UserError when there is no file, or when a dead link, a pipe or a device is among them.
    """
    check_installed(source)
    if is_in_package(source):
        source_root(source)
        return []
    found: dict[str, Path] = {}
    wrong: dict[str, str] = {}
    for name, path, reason in _wanted(source, poll):
        if reason is None:
            found[name] = path
        else:
            wrong[name] = reason
    _refuse(source, found, wrong)
    return sorted(found.items())


def check_source(source: Source) -> None:
    """Raise UserError when there is nothing to read. Stops at the first file."""
    check_installed(source)
    if is_in_package(source):
        source_root(source)
        return
    wrong: dict[str, str] = {}
    for name, _, reason in _wanted(source, lambda: None):
        if reason is None:
            return
        wrong[name] = reason
    _refuse(source, {}, wrong)


def _refuse(source: Source, found: dict[str, Path], wrong: dict[str, str]) -> None:
    refuse_unreadable(source, dict(sorted(wrong.items())), len(found) + len(wrong))
    if not found:
        raise UserError(
            f"data source {source.name!r} is empty: no file in {source_root(source)} matches {_pattern(source)!r}\n"
            "set path or pattern of this data.sources entry"
        )


def _pattern(source: Source) -> str:
    if source.pattern != "**/*":
        return source.pattern
    if source.kind == "idx":
        return "**/*images*"  # labels are beside the images
    return "**/*.py" if source.path == STDLIB else source.pattern


def _wanted(source: Source, poll: Callable[[], None]) -> Iterator[tuple[str, Path, str | None]]:
    """(relative path, path, why it is no file) of each entry that matches the pattern, folder by folder."""
    root, pattern = source_root(source), _pattern(source)
    if root.is_file():
        yield root.name, root, None
        return
    try:
        wanted = _glob(pattern)
    except re.error as e:
        raise UserError(f"data source {source.name!r}: {pattern!r} is not a pattern: {e}") from e
    for name, no_file in _walk(source, root, poll):
        if wanted.fullmatch(name) or (no_file and no_file.folder and "/" in pattern):
            yield name, root / name, no_file.words if no_file else None


@dataclass(frozen=True)
class _NoFile:
    """Why an entry is no file. `folder`: it may have been a folder, so its name need not match the pattern."""

    words: str
    folder: bool


def _walk(source: Source, root: Path, poll: Callable[[], None]) -> Iterator[tuple[str, _NoFile | None]]:
    """Relative paths of all entries but folders, links followed. (Path.glob skips linked and unreadable folders.)"""
    left_out = _STDLIB_LEFT_OUT if source.path == STDLIB else set[str]()
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        poll()
        with readable(source, root / folder):
            stat = (root / folder).stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue  # a link back: each folder counts once
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda e: e.name, reverse=True)
        for entry in entries:
            if entry.name.startswith(".") or entry.name in left_out:
                continue
            name = f"{folder}{entry.name}"
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, or a folder that may not be entered: `_no_file` tells which
                is_folder = is_file = False
            if is_folder:
                waiting.append(f"{name}/")
            else:
                yield name, None if is_file else _no_file(entry)


def _no_file(entry: os.DirEntry[str]) -> _NoFile:
    """Why an entry is neither file nor folder. `os.scandir` reports a link to nothing as neither."""
    try:
        os.stat(entry.path)
    except FileNotFoundError:
        if not entry.is_symlink():
            return _NoFile("it is gone", folder=False)
        target = os.readlink(entry.path)
        return _NoFile(f"a link to {target}, which is gone", folder=not os.path.splitext(target)[1])
    except OSError as error:
        return _NoFile(error.strerror or str(error), folder=False)
    return _NoFile("a pipe, socket or device", folder=False)


def _glob(pattern: str) -> re.Pattern[str]:
    """A glob over relative paths as a pattern: `*` and `?` stay within a name, `**/` matches any number of folders."""
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^]/]+\])", pattern)
    return re.compile("".join(special.get(p) or _set_or_text(p) for p in parts), re.DOTALL)


def _set_or_text(part: str) -> str:
    if len(part) > 2 and part[0] == "[" and part[-1] == "]" and part != "[!]":
        inside = re.escape(part[1:-1]).replace(r"\-", "-")
        return f"[^{inside[1:]}]" if inside[0] == "!" else f"[{inside}]"
    return re.escape(part)
